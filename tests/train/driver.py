"""A training driver for test_failures.py, in a process of its own with a Ray cluster of its own.

The one argument is JSON: spec (a pickled TrainSpec, hexadecimal), workers, min_workers, nodes (besides the head, a CPU
each), address (to join one instead), and `then`: what befalls the run once a checkpoint is there: nothing,
kill_worker, remove_node or drain_node. Prints the run's figures as JSON.
"""

import json
import os
import pickle
import signal
import sys
import threading
import time
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from raylava.cluster.session import ray_session
from raylava.config.recipe import Resources
from raylava.progress import NullProgressBar
from raylava.storage import storage_path
from raylava.train.ray_backend import train
from raylava.train.spec import CHECKPOINTS, SNAPSHOT, TrainSpec


def checkpoints(spec: TrainSpec) -> list[str]:
    """The checkpoints that Ray knows to be whole."""
    snapshot = storage_path(spec.output) / CHECKPOINTS / SNAPSHOT
    return [name for name in snapshot.read_bytes().decode().split('"') if "step-" in name] if snapshot.exists() else []


def befall(then: str, spec: TrainSpec, cluster: Cluster | None, nodes: list[Any]) -> None:
    deadline = time.monotonic() + 120
    while not checkpoints(spec) and time.monotonic() < deadline:
        time.sleep(0.02)
    if then == "kill_worker":
        workers = [one for one in psutil.process_iter(["cmdline"]) if _is_ours(one)]
        os.kill(max(workers, key=lambda one: one.pid).pid, signal.SIGKILL)
    elif then == "remove_node":
        assert cluster is not None
        cluster.remove_node(nodes[-1], allow_graceful=False)
    elif then == "drain_node":
        assert cluster is not None
        _drain(nodes[-1])
        time.sleep(8)  # the deadline that the notice gave: no condition can stand for it
        cluster.remove_node(nodes[-1], allow_graceful=False)


def _is_ours(process: psutil.Process) -> bool:
    if "RayTrainWorker" not in " ".join(process.info["cmdline"] or []):
        return False
    return os.getpid() in [parent.pid for parent in process.parents()]


def _drain(node: Any) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    preemption = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, _ = client.drain_node(node.node_id, preemption, "spot notice", int((time.time() + 8) * 1000))
    assert accepted


def main(given: dict[str, Any]) -> None:
    spec: TrainSpec = pickle.loads(bytes.fromhex(given["spec"]))  # noqa: S301 (the test made it)
    cluster, nodes = None, []
    if given.get("nodes"):
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "15"  # how long a lost node still counts as there
        os.environ.pop("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", None)  # as always: else a run ends before the notice
        os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.5"
        os.environ["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:1"  # no dashboard: Ray's helpers must not wait for one
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        nodes = [cluster.add_node(num_cpus=1) for _ in range(given["nodes"])]
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    if given.get("then"):
        threading.Thread(target=befall, args=(given["then"], spec, cluster, nodes), daemon=True).start()
    resources = Resources(workers=given["workers"], min_workers=given.get("min_workers"))
    with ray_session(resources):
        sys.stdout.write(json.dumps(train(spec, resources, NullProgressBar())) + "\n")
        sys.stdout.flush()
    ray.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
