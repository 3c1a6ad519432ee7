"""A training driver for tests/chaos/train, in a separate process with its own Ray cluster.

The only argument is JSON: spec (a pickled TrainSpec in hexadecimal), workers, min_workers, nodes (the number of one-CPU
nodes besides the head), and `failure`, which is injected once a new checkpoint is complete: remove_node, drain_node, or
break_gpu, after which each process on the last node raises CUDA's error in its first step; none by default. Prints the
metrics of the run as JSON.
"""

import json
import os
import pickle
import signal
import sys
import threading
import time
from functools import partial
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from raylava.cluster.preemption import Notice, drain_nodes
from raylava.cluster.session import ray_session
from raylava.config.recipe import Resources
from raylava.progress import NullProgressBar
from raylava.storage import StoragePath, storage_path
from raylava.train.engine import Engine, StepResult
from raylava.train.ray import driver
from raylava.train.ray.driver import run
from raylava.train.ray.worker import train_loop_per_worker
from raylava.train.spec import TrainSpec
from raylava.train.step_log import CHECKPOINTS, SNAPSHOT

CHECKPOINT_TIMEOUT_S = 120.0
# Ray notices within seconds that a node's processes are gone; one that answers slowly is not affected.
HEALTH_CHECK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 2,
}
HEAD = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH_CHECK}
NOTICE_S = 8  # time between the preemption notice and the loss of the node


def complete_checkpoints(run: StoragePath) -> set[str]:
    """Return the names of the checkpoints in a run's folder that Ray Train has recorded as complete."""
    snapshot = run / CHECKPOINTS / SNAPSHOT
    return (
        {name for name in snapshot.read_bytes().decode().split('"') if "step-" in name} if snapshot.exists() else set()
    )


def wait_for_new_checkpoint(spec: TrainSpec) -> None:
    """Wait until the run completes a checkpoint that does not exist yet."""
    output = storage_path(spec.output)
    existing = complete_checkpoints(output)
    deadline = time.monotonic() + CHECKPOINT_TIMEOUT_S
    while not complete_checkpoints(output) - existing:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def remove_node_after_checkpoint(failure: str, spec: TrainSpec, cluster: Cluster, nodes: list[Any]) -> None:
    """Remove the last node, for `drain_node` with a preemption notice, once there is a new checkpoint."""
    wait_for_new_checkpoint(spec)
    if failure == "drain_node":
        _drain(nodes[-1])
        time.sleep(NOTICE_S)  # the notice's own deadline: there is no condition to wait for instead
    cluster.remove_node(nodes[-1], allow_graceful=False)


def kill_worker_after_checkpoint(spec: TrainSpec) -> int:
    """Kill a training worker of this process's Ray cluster once there is a new checkpoint; return its process id."""
    wait_for_new_checkpoint(spec)
    worker = max(process.pid for process in psutil.process_iter(["cmdline"]) if _is_own_worker(process))
    os.kill(worker, signal.SIGKILL)
    return worker


def _is_own_worker(process: psutil.Process) -> bool:
    if "RayTrainWorker" not in " ".join(process.info["cmdline"] or []):
        return False
    return os.getpid() in [parent.pid for parent in process.parents()]


def _drain(node: Any) -> None:
    notice = Notice("spot notice", time.time() + NOTICE_S)
    drain_nodes(ray.get_runtime_context().gcs_address, node.node_id, notice)


def train_with_a_broken_gpu(node: str, config: dict[str, Any]) -> None:
    """Run raylava's own training function, whose steps fail on one node once there is a checkpoint."""
    if ray.get_runtime_context().get_node_id() == node:
        step = Engine.step

        def fail_after_a_checkpoint(engine: Engine, *args: Any) -> StepResult:
            if complete_checkpoints(storage_path(config["spec"].output)):
                raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
            return step(engine, *args)

        Engine.step = fail_after_a_checkpoint  # type: ignore[method-assign]
    train_loop_per_worker(config)


def start_cluster(node_count: int) -> tuple[Cluster, list[Any]]:
    """Start a cluster of a head without CPUs and one-CPU nodes, and connect to it."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "15"  # for this long a lost node still counts as alive
    # Ray Train's defaults; with a shorter interval the run would end before the notice.
    os.environ.pop("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", None)
    os.environ.pop("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", None)
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.5"
    os.environ["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:1"  # Ray's helpers must not wait for a dashboard
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(node_count)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    return cluster, nodes


def main(options: dict[str, Any]) -> None:
    spec: TrainSpec = pickle.loads(bytes.fromhex(options["spec"]))  # noqa: S301 (written by the test)
    if options.get("failure") == "break_gpu":
        _, nodes = start_cluster(options["nodes"])
        driver.train_loop_per_worker = partial(train_with_a_broken_gpu, nodes[-1].node_id)
    elif options.get("failure"):
        arguments = (options["failure"], spec, *start_cluster(options["nodes"]))
        threading.Thread(target=remove_node_after_checkpoint, args=arguments, daemon=True).start()
    resources = Resources(workers=options["workers"], min_workers=options.get("min_workers"))
    with ray_session(resources):
        sys.stdout.write(json.dumps(run(spec, resources, NullProgressBar())) + "\n")
        sys.stdout.flush()
    ray.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
