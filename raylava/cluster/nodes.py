"""What a cluster has: the nodes that live, and the node types that its autoscaler may start."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

from raylava.cluster.roles import cluster_file, matches
from raylava.errors import UserError


@dataclass(frozen=True)
class NodeType:
    """Nodes that are alike: what one of them has, its labels, and how many there are or may be."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    count: int


def live_nodes() -> list[NodeType]:
    """The nodes that live now, each by itself. Ray is joined."""
    return [NodeType(node["NodeID"], node["Resources"], node["Labels"], 1) for node in ray.nodes() if node["Alive"]]


def startable_node_types() -> list[NodeType] | None:
    """The worker types that this cluster's autoscaler may start; None where no file says."""
    file = cluster_file()
    return None if file is None else read_node_types(file)


def read_node_types(file: Path) -> list[NodeType]:
    """The worker types in a `ray up` file or a KubeRay manifest. Raises UserError for a file that is neither."""
    try:
        documents = [one for one in yaml.safe_load_all(file.read_text(encoding="utf-8")) if one]
        found = [kind for one in documents if (kind := _types_of(one)) is not None]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: not a cluster's file: {type(error).__name__} {error}") from error
    if not found:
        raise UserError(
            f"{file}: neither a `ray up` file nor a RayCluster or RayJob; see cluster/ for the shipped ones"
        )
    return found[0]


def _types_of(document: Mapping[str, Any]) -> list[NodeType] | None:
    if "available_node_types" in document:
        return _of_ray_up(document)
    if document.get("kind") == "RayCluster":
        return [_of_group(group) for group in document["spec"]["workerGroupSpecs"]]
    if document.get("kind") == "RayJob":
        return [_of_group(group) for group in document["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    return None


def _of_ray_up(document: Mapping[str, Any]) -> list[NodeType]:
    limit = int(document.get("max_workers", 2))  # Ray's own default
    return [
        NodeType(name, kind["resources"], kind.get("labels", {}), min(limit, int(kind.get("max_workers", limit))))
        for name, kind in document["available_node_types"].items()
        if name != document["head_node_type"]
    ]


def _of_group(group: Mapping[str, Any]) -> NodeType:
    """A worker group: Ray counts the limits of its container, or what rayStartParams or `resources` say instead."""
    (container, *_) = group["template"]["spec"]["containers"]
    limits = container.get("resources", {}).get("limits", {})
    given = group.get("rayStartParams", {})
    resources = {
        "CPU": float(given.get("num-cpus", _cores(str(limits.get("cpu", 0))))),
        "GPU": float(given.get("num-gpus", limits.get("nvidia.com/gpu", 0))),
    }
    resources |= {name: float(amount) for name, amount in group.get("resources", {}).items() if name in resources}
    return NodeType(group["groupName"], resources, group.get("labels", {}), int(group["maxReplicas"]))


def _cores(quantity: str) -> float:
    """A Kubernetes quantity of CPU: 500m or 8."""
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def matching_resources(labels: Mapping[str, str], types: list[NodeType] | None = None) -> dict[str, float]:
    """What the nodes that a label selector picks have in all, by resource: of `types`, else of those that live."""
    found: dict[str, float] = {}
    for one in live_nodes() if types is None else types:
        if matches(one.labels, labels):
            for name, amount in one.resources.items():
                found[name] = found.get(name, 0.0) + amount * one.count
    return found


def eventual_resources(labels: Mapping[str, str]) -> dict[str, float]:
    """What there is, or will be once the autoscaler has started all that it may."""
    now, later = matching_resources(labels), matching_resources(labels, startable_node_types() or [])
    return {name: max(now.get(name, 0.0), later.get(name, 0.0)) for name in now.keys() | later.keys()}
