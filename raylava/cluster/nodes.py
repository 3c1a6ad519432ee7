"""The capacity of a cluster: its live nodes, and the node types that its autoscaler may start."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

from raylava.cluster.roles import cluster_file, matches_selector
from raylava.errors import UserError

_RAY_UP_MAX_WORKERS = 2  # Ray's default


@dataclass(frozen=True)
class NodeType:
    """A group of identical nodes: the resources and labels of each, and the number of nodes (for a type: at most)."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    count: int


def live_nodes() -> list[NodeType]:
    """Return one entry for each live node of the connected Ray cluster."""
    return [NodeType(node["NodeID"], node["Resources"], node["Labels"], 1) for node in ray.nodes() if node["Alive"]]


def startable_node_types() -> list[NodeType] | None:
    """Return the worker types that the autoscaler may start, or None if the cluster's configuration is unknown."""
    file = cluster_file()
    return None if file is None else read_node_types(file)


def read_node_types(file: Path) -> list[NodeType]:
    """Return the worker types of a `ray up` configuration or a KubeRay manifest.

    Raises UserError if the file cannot be read or is neither of the two.
    """
    try:
        documents = [document for document in yaml.safe_load_all(file.read_text(encoding="utf-8")) if document]
        clusters = [types for document in documents if (types := _document_types(document)) is not None]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a valid cluster file: {type(error).__name__} {error}") from error
    if not clusters:
        raise UserError(
            f"{file}: neither a `ray up` file nor a RayCluster or RayJob; see cluster/ for the shipped files"
        )
    return clusters[0]


def _document_types(document: Mapping[str, Any]) -> list[NodeType] | None:
    if "available_node_types" in document:
        return _ray_up_types(document)
    if document.get("kind") == "RayCluster":
        return [_worker_group_type(group) for group in document["spec"]["workerGroupSpecs"]]
    if document.get("kind") == "RayJob":
        return [_worker_group_type(group) for group in document["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    return None


def _ray_up_types(document: Mapping[str, Any]) -> list[NodeType]:
    limit = int(document.get("max_workers", _RAY_UP_MAX_WORKERS))
    return [
        NodeType(name, node["resources"], node.get("labels", {}), min(limit, int(node.get("max_workers", limit))))
        for name, node in document["available_node_types"].items()
        if name != document["head_node_type"]
    ]


def _worker_group_type(group: Mapping[str, Any]) -> NodeType:
    """Return a KubeRay worker group as a node type.

    As in Ray, `resources` overrides `rayStartParams`, which override the limits of the first container.
    """
    (container, *_) = group["template"]["spec"]["containers"]
    limits = container.get("resources", {}).get("limits", {})
    start_params = group.get("rayStartParams", {})
    resources = {
        "CPU": float(start_params.get("num-cpus", _cores(str(limits.get("cpu", 0))))),
        "GPU": float(start_params.get("num-gpus", limits.get("nvidia.com/gpu", 0))),
    }
    resources |= {name: float(amount) for name, amount in group.get("resources", {}).items() if name in resources}
    return NodeType(group["groupName"], resources, group.get("labels", {}), int(group["maxReplicas"]))


def _cores(quantity: str) -> float:
    """Convert a Kubernetes CPU quantity (500m or 8) to a number of cores."""
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def matching_resources(labels: Mapping[str, str], types: list[NodeType] | None = None) -> dict[str, float]:
    """Return the total resources of the nodes that match a label selector, among `types` or the live nodes."""
    totals: dict[str, float] = {}
    for node_type in live_nodes() if types is None else types:
        if matches_selector(node_type.labels, labels):
            for name, amount in node_type.resources.items():
                totals[name] = totals.get(name, 0.0) + amount * node_type.count
    return totals


def eventual_resources(labels: Mapping[str, str]) -> dict[str, float]:
    """Return the total resources of matching nodes once the autoscaler has started all nodes that it may."""
    now, later = matching_resources(labels), matching_resources(labels, startable_node_types() or [])
    return {name: max(now.get(name, 0.0), later.get(name, 0.0)) for name in now.keys() | later.keys()}
