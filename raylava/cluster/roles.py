"""Which nodes a stage's work may go to: a recipe's own label selectors, or the roles that a cluster gives its nodes."""

import os
from collections.abc import Mapping
from pathlib import Path

from raylava.config.recipe import Resources

ROLE = "raylava.io/role"
PREPARE, TRAIN = "prepare", "train"
NODE_ROLES = "RAYLAVA_NODE_ROLES"  # set where a cluster's workers carry ROLE, as those of cluster/ do
CLUSTER_FILE = "RAYLAVA_CLUSTER"  # names the file that describes the cluster, where it is not where `ray up` puts it
_OF_RAY_UP = Path("~/ray_bootstrap_config.yaml")  # on the head


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node with `labels` is one that Ray's label selector means: value, !value, in(a,b), !in(a,b)."""
    return all(_is_meant(labels.get(key), wanted) for key, wanted in selector.items())


def _is_meant(value: str | None, wanted: str) -> bool:
    if wanted.startswith("!"):
        return not _is_meant(value, wanted[1:])
    if wanted.startswith("in(") and wanted.endswith(")"):
        return value in [one.strip() for one in wanted[3:-1].split(",")]
    return value == wanted


def has_roles() -> bool:
    """Whether the cluster of this driver says that its nodes carry roles."""
    return os.environ.get(NODE_ROLES, "") not in ("", "0")


def cluster_file() -> Path | None:
    """The file that the autoscaler of this driver's cluster goes by, where there is one to read."""
    file = Path(os.environ.get(CLUSTER_FILE) or _OF_RAY_UP).expanduser()
    return file if file.exists() else None


def labels_for(role: str, resources: Resources, roles: bool | None = None) -> dict[str, str]:
    """The label selector (in Ray's syntax) of the nodes for `prepare` or `train`; empty where any will do."""
    own = resources.prepare_node_labels if role == PREPARE else resources.train_node_labels
    if own:
        return dict(own)
    return {ROLE: role} if (has_roles() if roles is None else roles) else {}
