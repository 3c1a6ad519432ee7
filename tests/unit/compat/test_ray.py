"""The private parts of Ray that raylava uses exist and do what the feature that uses them needs."""

from pathlib import Path

import pytest
import yaml

from raylava.compat.ray import InvalidClusterConfigError, validate_cluster_config

ROOT = Path(__file__).parents[3]


def test_local_cluster_up_refuses_what_rays_autoscaler_would_refuse() -> None:
    """Symbols: ray.autoscaler._private.util.prepare_config and validate_config."""
    config = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())
    validate_cluster_config(config)
    with pytest.raises(InvalidClusterConfigError, match="max_wrokers"):
        validate_cluster_config(config | {"max_wrokers": 3})
