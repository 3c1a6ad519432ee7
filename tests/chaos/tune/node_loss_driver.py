"""Runs a sweep on a Ray cluster that loses a node; executed in a separate process by test_sweep_failures.py.

The only argument is JSON with the keys `sweep` (a file) and `storage`. One of the two worker nodes is killed as soon as
a finetuning run has a checkpoint. Prints the (outcome, failure) of each trial as JSON.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from raylava.console import Console
from raylava.storage import storage_path
from raylava.tune.runner import SweepRun
from raylava.tune.sweep import load_sweep


def kill_node_after_first_checkpoint(storage: Path, cluster: Cluster, node: Any) -> None:
    deadline = time.monotonic() + 180
    while not list(storage.glob("finetune/*/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    cluster.remove_node(node, allow_graceful=False)
    (storage / "lost").touch()


def main(arguments: dict[str, str]) -> None:
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "15"  # Ray counts a lost node's CPUs until then
    os.environ["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:1"  # no dashboard: Ray's clients must not wait for one
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    storage = Path(arguments["storage"])
    threading.Thread(target=kill_node_after_first_checkpoint, args=(storage, cluster, nodes[-1]), daemon=True).start()
    trials = SweepRun(load_sweep(arguments["sweep"]), [], storage_path(storage)).run(Console(sys.stderr))
    sys.stdout.write(json.dumps([[trial.outcome, trial.failure] for trial in trials]) + "\n")
    sys.stdout.flush()
    ray.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
