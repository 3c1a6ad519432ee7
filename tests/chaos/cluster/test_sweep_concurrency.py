"""A sweep on a cluster that raylava has no file of and that starts without worker nodes: its trials make it grow."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.local_cluster import ROOT, running_cluster, worker_nodes

TRAIN_NODES = 3  # the most that cluster/local-cluster.yaml allows, with one CPU each


def test_sweep_of_8_begins_with_no_node_and_reaches_the_limit_of_the_cluster(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "bench" / "sweep.py"), "--trials", "8", "--kill-at", "0", "--json"]
    command += ["--seconds", "8"]
    with running_cluster() as cluster:
        assert worker_nodes(cluster) == {}
        environment = cluster.environment() | {
            "RAY_ADDRESS": cluster.gcs,
            "RAYLAVA_NODE_ROLES": "1",
            "HOME": str(tmp_path),  # no file of `ray up` either
        }
        run = subprocess.run(
            [*command, "--storage", str(tmp_path / "storage")],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["complete"] == 8
    running = result["concurrency"]
    assert max(running) == TRAIN_NODES, running
    assert running.index(TRAIN_NODES) < 60, "within a minute of the first training"
