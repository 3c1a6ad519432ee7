"""Node selection for stages: the recipe's label selectors, or else the roles that a cluster gives its nodes."""

import os
from collections.abc import Mapping
from pathlib import Path

from raylava.config.recipe import Resources

ROLE = "raylava.io/role"
PREPARE, TRAIN = "prepare", "train"
NODE_ROLES = "RAYLAVA_NODE_ROLES"  # set on clusters whose worker nodes carry the ROLE label, such as those in cluster/
CLUSTER_FILE = "RAYLAVA_CLUSTER"  # path of the cluster's configuration file, if not where `ray up` writes it
_RAY_UP_CONFIG = Path("~/ray_bootstrap_config.yaml")  # on the head node


def matches_selector(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Return whether node labels match a Ray label selector with the forms value, !value, in(a,b) and !in(a,b)."""
    return all(_matches_condition(labels.get(key), condition) for key, condition in selector.items())


def _matches_condition(value: str | None, condition: str) -> bool:
    if condition.startswith("!"):
        return not _matches_condition(value, condition[1:])
    if condition.startswith("in(") and condition.endswith(")"):
        return value in [choice.strip() for choice in condition[3:-1].split(",")]
    return value == condition


def cluster_has_roles() -> bool:
    """Return whether the driver's cluster declares that its nodes carry the ROLE label."""
    return os.environ.get(NODE_ROLES, "") not in ("", "0")


def cluster_file() -> Path | None:
    """Return the autoscaler configuration file of the driver's cluster, or None if there is none to read."""
    file = Path(os.environ.get(CLUSTER_FILE) or _RAY_UP_CONFIG).expanduser()
    return file if file.exists() else None


def node_labels_for(role: str, resources: Resources, roles: bool | None = None) -> dict[str, str]:
    """Return the Ray label selector for the nodes of a role (PREPARE or TRAIN); empty if any node is suitable.

    The recipe's selector takes precedence over the cluster's roles. `roles` states whether nodes carry the ROLE label;
    None means asking the cluster.
    """
    selector = resources.prepare_node_labels if role == PREPARE else resources.train_node_labels
    if selector:
        return dict(selector)
    return {ROLE: role} if (cluster_has_roles() if roles is None else roles) else {}
