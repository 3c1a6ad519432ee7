"""Helpers for tests that submit jobs to an autoscaling cluster on this machine."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from raylava.artifacts import Artifact
from raylava.cluster import local_cluster
from raylava.cluster.local_cluster import LocalCluster
from raylava.cluster.node_provider import HEAD, NODE_ID, NODE_TYPE, node_processes
from raylava.config.recipe import Recipe
from raylava.storage import StoragePath
from raylava.toy.demo import toy_recipe
from raylava.train.step_log import STEP_LOG
from tests.support.train_driver import complete_checkpoints

ROOT = Path(__file__).parents[2]
CLUSTER_CONFIG = ROOT / "cluster" / "local-cluster.yaml"


@contextmanager
def running_cluster() -> Iterator[LocalCluster]:
    """Start a local cluster, and check at the end that none of its processes remains."""
    cluster = local_cluster.start(CLUSTER_CONFIG)
    try:
        yield cluster
    finally:
        cluster.stop()
    assert not list(cluster.processes())


def two_worker_recipe(toy_assets: Artifact) -> Recipe:
    """Return a recipe of 72 finetuning steps with a checkpoint every eight, without pretraining to save time."""
    settings = ["resources.workers=2", "resources.cpus_per_worker=1", "evaluate.0.baselines=[]"]
    training = ["finetune.global_batch_size=8", "finetune.epochs=12", "finetune.checkpoint={interval_steps: 8}"]
    return toy_recipe(toy_assets.path, [*settings, *training, "pretrain.enabled=false"])


def write_recipe(recipe: Recipe, folder: Path) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_dump(mode="json")))
    return file


def start_python(cluster: LocalCluster, *arguments: str, cwd: Path = ROOT) -> "subprocess.Popen[str]":
    """Start Python with the environment that connects it to the cluster's job server."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=environment | cluster.environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )


def start_raylava(cluster: LocalCluster, *arguments: str, cwd: Path = ROOT) -> "subprocess.Popen[str]":
    return start_python(cluster, "-m", "raylava.cli", *arguments, cwd=cwd)


def output_of(process: "subprocess.Popen[str]") -> str:
    """Wait for the process to succeed and return its output."""
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-5000:]
    return output


def worker_nodes(cluster: LocalCluster) -> dict[int, str]:
    """Return the node type of each worker node by the process id of its raylet."""
    nodes = {}
    for process in cluster.processes():
        with suppress(psutil.NoSuchProcess):
            if process.name() == "raylet" and process.environ()[NODE_ID] != HEAD:
                nodes[process.pid] = process.environ()[NODE_TYPE]
    return nodes


def kill_node(cluster: LocalCluster, raylet: int) -> None:
    """Kill all processes of a node with SIGKILL, as if a cloud had terminated the machine."""
    for process in node_processes(psutil.Process(raylet).environ()[NODE_ID], cluster.folder):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def wait_for(
    condition: Callable[[], bool], process: "subprocess.Popen[str] | None" = None, timeout_s: float = 240
) -> None:
    """Wait until the condition holds, while the process runs."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0][-5000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def checkpoints(storage: StoragePath) -> set[str]:
    """Return the complete checkpoints of unfinished finetune stages."""
    return {name for run in (storage / "finetune").children() for name in complete_checkpoints(run)}


def step_log(storage: StoragePath) -> list[dict[str, Any]]:
    (folder,) = (storage / "finetune").children()
    return [json.loads(line) for line in (folder / STEP_LOG).read_bytes().splitlines()]
