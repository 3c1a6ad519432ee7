"""What raylava exports to Prometheus, and the Grafana board that draws it."""

import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import ray

from raylava.cluster.gauges import KNOWN, Gauges, exported
from raylava.train.metrics import StepMetrics

BOARD = json.loads((Path(__file__).parents[2] / "cluster" / "grafana" / "raylava.json").read_text())


def test_every_figure_of_a_step_is_known_by_its_name() -> None:
    assert list(KNOWN)[: len(StepMetrics.__dataclass_fields__)] == list(StepMetrics.__dataclass_fields__)


def queries(board: Any) -> list[str]:
    if isinstance(board, dict):
        found = [board[key] for key in ("expr", "query") if isinstance(board.get(key), str)]
        return found + [one for value in board.values() for one in queries(value)]
    return [one for value in board for one in queries(value)] if isinstance(board, list) else []


def test_the_board_asks_for_nothing_that_is_not_exported_and_for_what_a_run_is_watched_by() -> None:
    asked = {name for query in queries(BOARD) for name in re.findall(r"\bray_\w+", query)}
    assert asked <= exported().keys()
    watched = ("tokens_per_second", "mfu", "data_wait_fraction", "loss", "checkpoint_time_seconds", "quarantined_rows")
    assert {f"ray_raylava_{name}" for name in (*watched, "lost_workers", "worker_seconds")} <= asked


def test_gauges_reach_prometheus_with_run_stage_and_rank(ray_cluster: None) -> None:
    Gauges("0123456789abcdef", "finetune", 3).set(**dict.fromkeys(KNOWN, 7.0))
    (node,) = (one for one in ray.nodes() if one["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    missing = set(exported())
    while missing:
        assert time.monotonic() < deadline, missing
        with urllib.request.urlopen(url, timeout=10) as answer:
            told = answer.read().decode()
        mine = [line for line in told.splitlines() if 'run="0123456789abcdef"' in line]
        missing -= {line.split("{")[0] for line in mine if 'stage="finetune"' in line and 'rank="3"' in line}
        time.sleep(0.5)
