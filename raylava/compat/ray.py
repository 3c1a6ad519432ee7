"""The private parts of Ray that raylava uses.

The validation of a cluster file: `ray up` validates by the same functions, but only while it creates a cluster.
"""

import copy
from collections.abc import Mapping
from typing import Any

from ray.autoscaler._private.util import prepare_config, validate_config


class InvalidClusterConfigError(ValueError):
    """Ray's autoscaler would refuse the configuration."""


def validate_cluster_config(config: Mapping[str, Any]) -> None:
    """Check a cluster configuration as `ray up` does, by Ray's schema. Raises InvalidClusterConfigError."""
    try:
        validate_config(prepare_config(copy.deepcopy(dict(config))))
    except Exception as error:  # jsonschema.ValidationError, ValueError, KeyError and others
        raise InvalidClusterConfigError(str(error)) from error
