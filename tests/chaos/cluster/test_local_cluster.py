"""Recipes on an autoscaling cluster that loses nodes: the result is that of an uninterrupted run.

One machine hosts the cluster, with its job server, autoscaler v2 and token authentication.
"""

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylava.artifacts import Artifact
from raylava.cluster import local_cluster
from raylava.cluster.local_cluster import LocalCluster
from raylava.config.recipe import Recipe
from raylava.console import Console
from raylava.pipeline.runner import run
from raylava.storage import StoragePath, storage_path
from tests.support.local_cluster import (
    CLUSTER_CONFIG,
    checkpoint_count,
    kill_node,
    output_of,
    running_cluster,
    start_raylava,
    step_log,
    training_result,
    two_worker_recipe,
    wait_for,
    worker_nodes,
    write_recipe,
)

pytestmark = pytest.mark.usefixtures("default_health_check_interval")


@pytest.fixture(scope="module")
def recipe(toy_assets: Artifact) -> Recipe:
    return two_worker_recipe(toy_assets)


@pytest.fixture(scope="module")
def file(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(recipe, tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def uninterrupted_run(recipe: Recipe, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> StoragePath:
    """The storage of a run without failures, on the Ray cluster of the test session."""
    storage = tmp_path_factory.mktemp("uninterrupted")
    with (storage / "console.txt").open("w") as stream:
        run(recipe, storage_path(storage), Console(stream))
    return storage_path(storage)


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with running_cluster() as cluster:
        yield cluster


def test_nodes_start_per_stage_and_resume_after_node_loss_is_bitwise_identical(
    cluster: LocalCluster, file: Path, uninterrupted_run: StoragePath, tmp_path: Path
) -> None:
    storage = storage_path(tmp_path)
    assert worker_nodes(cluster) == {}, "an idle cluster consists of its head"
    submit = start_raylava(cluster, "submit", str(file), "--storage", str(tmp_path))
    wait_for(lambda: "cpu_spot" in worker_nodes(cluster).values(), submit)
    while not list(tmp_path.glob("prepare/*/artifact.json")):
        assert submit.poll() is None
        assert "gpu_spot" not in worker_nodes(cluster).values() or list(tmp_path.glob("prepare/*/artifact.json")), (
            "a GPU node started before training needed it"
        )
    wait_for(lambda: Counter(worker_nodes(cluster).values())["gpu_spot"] == 2, submit)
    wait_for(lambda: checkpoint_count(storage) > 0, submit)
    lost = next(raylet for raylet, node_type in worker_nodes(cluster).items() if node_type == "gpu_spot")
    kill_node(cluster, lost)
    output = output_of(submit)
    assert "resuming from the last checkpoint" in output
    assert training_result(storage) == training_result(uninterrupted_run)
    assert lost not in worker_nodes(cluster)
    wait_for(lambda: worker_nodes(cluster) == {})
    second_output = output_of(start_raylava(cluster, "submit", str(file), "--storage", str(tmp_path)))
    assert second_output.count(" reused ") == second_output.count("✓") == 3, "all artifacts are reused"


def test_resubmission_after_head_loss_resumes_from_the_last_checkpoint(
    file: Path, uninterrupted_run: StoragePath, tmp_path: Path
) -> None:
    storage = storage_path(tmp_path)
    shutil.copytree((uninterrupted_run / "prepare").path, tmp_path / "prepare")  # only training is interrupted
    submit_command = ["submit", str(file), "--storage", str(tmp_path), "evaluate=[]"]
    first = local_cluster.start(CLUSTER_CONFIG)
    try:
        submit = start_raylava(first, *submit_command)
        wait_for(lambda: checkpoint_count(storage) > 0, submit)
        gcs = next(process for process in first.processes() if process.name() == "gcs_server")
        gcs.kill()
        killed_at = time.time()
        submit.communicate(timeout=120)
        assert submit.returncode != 0
    finally:
        first.stop()
    second = local_cluster.start(CLUSTER_CONFIG)
    try:
        output_of(start_raylava(second, *submit_command))
    finally:
        second.stop()
    assert training_result(storage) == training_result(uninterrupted_run)
    assert any(record["time"] < killed_at for record in step_log(storage)), "steps before the loss are not repeated"
