"""The metrics exported to Prometheus and the Grafana board that displays them."""

import json
import re
from pathlib import Path
from typing import Any

from raylava.cluster.gauges import GAUGES, exported_gauges
from raylava.train.metrics import StepMetrics

BOARD = json.loads((Path(__file__).parents[3] / "cluster" / "grafana" / "raylava.json").read_text())


def test_every_step_metric_has_a_gauge_of_the_same_name() -> None:
    assert list(GAUGES)[: len(StepMetrics.__dataclass_fields__)] == list(StepMetrics.__dataclass_fields__)


def queries(node: Any) -> list[str]:
    """Return all Prometheus queries in a part of the board's JSON."""
    if isinstance(node, dict):
        texts = [node[key] for key in ("expr", "query") if isinstance(node.get(key), str)]
        return texts + [query for value in node.values() for query in queries(value)]
    return [query for value in node for query in queries(value)] if isinstance(node, list) else []


def test_board_queries_only_exported_metrics_and_all_that_monitor_a_run() -> None:
    queried = {name for query in queries(BOARD) for name in re.findall(r"\bray_\w+", query)}
    assert queried <= exported_gauges().keys()
    required = ("tokens_per_second", "mfu", "data_wait_fraction", "loss", "checkpoint_time_seconds", "quarantined_rows")
    assert {f"ray_raylava_{name}" for name in (*required, "lost_workers", "worker_seconds")} <= queried
