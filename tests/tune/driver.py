"""A sweep on a cluster that loses a node, for test_survival.py: in a process of its own with a Ray cluster of its own.

The one argument is JSON: sweep (a file), storage. A node that has a CPU, and any trial that waits there, is killed
once a finetuning has a checkpoint. Prints how each trial ended as JSON.
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


def lose_a_node(storage: Path, cluster: Cluster, node: Any) -> None:
    deadline = time.monotonic() + 180
    while not list(storage.glob("finetune/*/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    cluster.remove_node(node, allow_graceful=False)
    (storage / "lost").touch()


def main(given: dict[str, Any]) -> None:
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "15"  # how long a lost node still counts as there
    os.environ["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:1"  # no dashboard: Ray's helpers must not wait for one
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    storage = Path(given["storage"])
    threading.Thread(target=lose_a_node, args=(storage, cluster, nodes[-1]), daemon=True).start()
    ended = SweepRun(load_sweep(given["sweep"]), [], storage_path(storage)).run(Console(sys.stderr))
    sys.stdout.write(json.dumps([[one.how, one.failure] for one in ended]) + "\n")
    sys.stdout.flush()
    ray.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
