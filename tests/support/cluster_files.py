"""Access to the files in cluster/."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
MARKET = "ray.io/market-type"

Config = dict[str, Any]


def documents(name: str) -> list[Config]:
    """Return the YAML documents of a file in cluster/."""
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def dockerfile_text() -> str:
    return (CLUSTER / "Dockerfile").read_text()
