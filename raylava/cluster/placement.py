"""What a recipe wants of a cluster, and whether the cluster has it, will have it, or never can: pure.

Nothing here asks Ray; nodes.py tells what there is. Memory, time and money are not counted here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raylava.cluster.nodes import NodeType
from raylava.cluster.roles import PREPARE, TRAIN, labels_for, matches
from raylava.config.recipe import Recipe


@dataclass(frozen=True)
class ResourceRequest:
    """What stages want at once: `workers` bundles (at least `at_least` of them), each on one node with such labels."""

    stages: tuple[str, ...]
    workers: int
    min_workers: int
    bundle: Mapping[str, float]
    labels: Mapping[str, str]

    @property
    def description(self) -> str:
        """2 × {CPU: 1, GPU: 1} on raylava.io/role=train"""
        bundle = ", ".join(f"{name}: {amount:g}" for name, amount in self.bundle.items())
        labels = ", ".join(f"{key}={value}" for key, value in self.labels.items())
        return f"{self.workers} × {{{bundle}}}" + (f" on {labels}" if labels else "")


@dataclass(frozen=True)
class Placement:
    """How a need is met: bundles that fit on the nodes there are, and on those there may be (None: not known)."""

    request: ResourceRequest
    fits_now: int
    fits_eventually: int | None
    nodes: int | None  # of the type that holds most bundles, how many all workers take
    reason: str = ""  # why it never can be met

    @property
    def is_impossible(self) -> bool:
        """No node that lives or may be started will make the stage begin."""
        return bool(self.reason)


def resource_requests(recipe: Recipe, roles: bool) -> list[ResourceRequest]:
    """What the recipe's stages want. `roles` says whether the cluster's nodes carry raylava.io/role."""
    resources = recipe.resources
    bundle: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        bundle["GPU"] = resources.gpus_per_worker
    at_least = resources.min_workers or resources.workers
    trained = ("pretrain", "finetune") if recipe.pretrain.enabled else ("finetune",)
    train_node_labels = labels_for(TRAIN, resources, roles)
    found = [
        ResourceRequest(("prepare",), 1, 1, {"CPU": 1}, labels_for(PREPARE, resources, roles)),
        ResourceRequest(trained, resources.workers, at_least, bundle, train_node_labels),
    ]
    if recipe.evaluate:
        found.append(ResourceRequest(("evaluate",), resources.workers, 1, bundle, train_node_labels))
    return found


def placements(
    wanted: Sequence[ResourceRequest], there: Sequence[NodeType], types: Sequence[NodeType] | None
) -> list[Placement]:
    """How each need is met by the nodes `there` are and the types that may be started (None: nobody knows)."""
    return [_provision(need, there, types) for need in wanted]


def _provision(need: ResourceRequest, there: Sequence[NodeType], types: Sequence[NodeType] | None) -> Placement:
    now = _fitting(need, there)
    later = None if types is None else max(now, _fitting(need, types))
    best = max((_on_one(need, one) for one in [*there, *(types or [])] if matches(one.labels, need.labels)), default=0)
    reason = (
        "" if types is None or later is None or later >= need.min_workers else _reason(need, [*there, *types], later)
    )
    return Placement(need, now, later, math.ceil(need.workers / best) if best else None, reason)


def _fitting(need: ResourceRequest, types: Sequence[NodeType]) -> int:
    return sum(one.count * _on_one(need, one) for one in types if matches(one.labels, need.labels))


def _on_one(need: ResourceRequest, node: NodeType) -> int:
    """Bundles that an empty node holds."""
    return min(int(node.resources.get(name, 0.0) // amount) for name, amount in need.bundle.items() if amount)


def _reason(need: ResourceRequest, types: Sequence[NodeType], later: int) -> str:
    labelled = [one for one in types if matches(one.labels, need.labels)]
    if not labelled:
        return "no node and no node type has these labels"
    if later == 0:
        largest = max(labelled, key=lambda one: one.resources.get("GPU", 0.0) + one.resources.get("CPU", 0.0) / 1000)
        has = ", ".join(f"{name}: {largest.resources.get(name, 0.0):g}" for name in need.bundle)
        return f"one worker does not fit on one node; the largest, {largest.name}, has {{{has}}}"
    return f"at most {later} of at least {need.min_workers} workers fit; raise max_workers, or lower resources.workers"
