"""The resources that a recipe requests of a cluster, and whether they fit now, after autoscaling, or never.

Pure: nodes.py supplies the cluster's capacity. Memory, time and price are not considered here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raylava.cluster.nodes import NodeType
from raylava.cluster.roles import PREPARE, TRAIN, matches_selector, node_labels_for
from raylava.config.recipe import Recipe, Resources


@dataclass(frozen=True)
class ResourceRequest:
    """The simultaneous request of some stages: `workers` bundles, of which `min_workers` suffice to start.

    Each bundle must fit on one node that matches the label selector `labels`.
    """

    stages: tuple[str, ...]
    workers: int
    min_workers: int
    bundle: Mapping[str, float]
    labels: Mapping[str, str]

    @property
    def description(self) -> str:
        """The request as text, such as `2 × {CPU: 1, GPU: 1} on raylava.io/role=train`."""
        bundle = ", ".join(f"{name}: {amount:g}" for name, amount in self.bundle.items())
        labels = ", ".join(f"{key}={value}" for key, value in self.labels.items())
        return f"{self.workers} × {{{bundle}}}" + (f" on {labels}" if labels else "")


@dataclass(frozen=True)
class Placement:
    """How a cluster satisfies a request.

    `fits_now` is the number of bundles that fit on live nodes, `fits_eventually` the number after autoscaling (None:
    unknown), `nodes` the number of nodes for all workers on the node type that holds most bundles (None: no such node).
    `reason` explains why the request can never be satisfied; it is empty otherwise.
    """

    request: ResourceRequest
    fits_now: int
    fits_eventually: int | None
    nodes: int | None
    reason: str = ""

    @property
    def is_impossible(self) -> bool:
        """Whether neither live nodes nor nodes that may be started let the stages begin."""
        return bool(self.reason)


def resource_requests(recipe: Recipe, roles: bool) -> list[ResourceRequest]:
    """Return the requests of the recipe's stages. `roles` states whether nodes carry the label raylava.io/role."""
    resources = recipe.resources
    training_stages = ("pretrain", "finetune") if recipe.pretrain.enabled else ("finetune",)
    train_labels = node_labels_for(TRAIN, resources, roles)
    requests = [
        ResourceRequest(("prepare",), 1, 1, {"CPU": 1}, node_labels_for(PREPARE, resources, roles)),
        training_request(training_stages, resources, train_labels),
    ]
    if recipe.evaluate:
        requests.append(ResourceRequest(("evaluate",), resources.workers, 1, worker_bundle(resources), train_labels))
    return requests


def training_request(stages: tuple[str, ...], resources: Resources, labels: Mapping[str, str]) -> ResourceRequest:
    """Return the request of training stages for nodes with these labels."""
    min_workers = resources.min_workers or resources.workers
    return ResourceRequest(stages, resources.workers, min_workers, worker_bundle(resources), labels)


def worker_bundle(resources: Resources) -> dict[str, float]:
    """Return what one worker takes of its node."""
    gpus = {"GPU": float(resources.gpus_per_worker)} if resources.gpus_per_worker else {}
    return {"CPU": float(resources.cpus_per_worker)} | gpus


def placements(
    requests: Sequence[ResourceRequest], live: Sequence[NodeType], startable: Sequence[NodeType] | None
) -> list[Placement]:
    """Return the placement of each request on the `live` nodes and the `startable` node types (None: unknown)."""
    return [_place(request, live, startable) for request in requests]


def _place(request: ResourceRequest, live: Sequence[NodeType], startable: Sequence[NodeType] | None) -> Placement:
    fits_now = _count_bundles(request, live)
    candidates = [*live, *(startable or [])]
    per_node = [_bundles_per_node(request, node) for node in candidates if _matches(request, node)]
    most_per_node = max(per_node, default=0)
    nodes = math.ceil(request.workers / most_per_node) if most_per_node else None
    if startable is None:
        return Placement(request, fits_now, None, nodes)
    fits_eventually = max(fits_now, _count_bundles(request, startable))
    is_possible = fits_eventually >= request.min_workers
    reason = "" if is_possible else _explain(request, candidates, fits_eventually)
    return Placement(request, fits_now, fits_eventually, nodes, reason)


def _matches(request: ResourceRequest, node: NodeType) -> bool:
    return matches_selector(node.labels, request.labels)


def _count_bundles(request: ResourceRequest, types: Sequence[NodeType]) -> int:
    return sum(node.count * _bundles_per_node(request, node) for node in types if _matches(request, node))


def _bundles_per_node(request: ResourceRequest, node: NodeType) -> int:
    """Return how many bundles of the request fit on an empty node."""
    return min(int(node.resources.get(name, 0.0) // amount) for name, amount in request.bundle.items() if amount)


def _explain(request: ResourceRequest, types: Sequence[NodeType], fits_eventually: int) -> str:
    """Return why fewer than the minimum number of workers fit."""
    matching = [node for node in types if _matches(request, node)]
    if not matching:
        return "no node and no node type has these labels"
    if fits_eventually == 0:
        largest = max(matching, key=lambda node: node.resources.get("GPU", 0.0) + node.resources.get("CPU", 0.0) / 1000)
        capacity = ", ".join(f"{name}: {largest.resources.get(name, 0.0):g}" for name in request.bundle)
        return f"one worker does not fit on one node; the largest, {largest.name}, has {{{capacity}}}"
    return (
        f"at most {fits_eventually} of at least {request.min_workers} workers fit; "
        "raise max_workers, or lower resources.workers"
    )
