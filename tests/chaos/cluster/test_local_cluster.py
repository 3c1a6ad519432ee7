"""A recipe on an autoscaling cluster that loses a node and then its head: the result is that of an uninterrupted run.

One machine hosts the clusters, with their job server, autoscaler v2 and token authentication.
"""

import time
from collections import Counter
from pathlib import Path

import pytest

from raylava.artifacts import Artifact
from raylava.storage import storage_path
from tests.support.local_cluster import (
    checkpoints,
    kill_node,
    output_of,
    running_cluster,
    start_raylava,
    step_log,
    two_worker_recipe,
    wait_for,
    worker_nodes,
    write_recipe,
)
from tests.support.torchrun import copy_inputs, finish_training, read_training, start_training


@pytest.mark.timeout(900)  # two clusters, three submitted jobs
@pytest.mark.usefixtures("default_ray_train_settings")
def test_recipe_that_loses_a_node_and_then_the_head_is_bitwise_identical(toy_assets: Artifact, tmp_path: Path) -> None:
    recipe = two_worker_recipe(toy_assets)
    path = tmp_path / "storage"
    path.mkdir()
    storage = storage_path(path)
    command = ["submit", str(write_recipe(recipe, tmp_path)), "--storage", str(path)]

    with running_cluster() as cluster:
        assert worker_nodes(cluster) == {}, "an idle cluster consists of its head"
        submit = start_raylava(cluster, *command)
        wait_for(lambda: "cpu_spot" in worker_nodes(cluster).values(), submit)
        while not list(path.glob("prepare/*/artifact.json")):
            assert submit.poll() is None
            assert "gpu_spot" not in worker_nodes(cluster).values() or list(path.glob("prepare/*/artifact.json")), (
                "a GPU node started before training needed it"
            )
        wait_for(lambda: Counter(worker_nodes(cluster).values())["gpu_spot"] == 2, submit)
        wait_for(lambda: bool(checkpoints(storage)), submit)
        lost = next(raylet for raylet, node_type in worker_nodes(cluster).items() if node_type == "gpu_spot")
        kill_node(cluster, lost)
        before = checkpoints(storage)
        wait_for(lambda: bool(checkpoints(storage) - before), submit)
        assert lost not in worker_nodes(cluster)
        next(process for process in cluster.processes() if process.name() == "gcs_server").kill()
        killed_at = time.time()
        output, _ = submit.communicate(timeout=120)
        assert submit.returncode != 0
        assert "resuming from the last checkpoint" in output

    with running_cluster() as cluster:
        output_of(start_raylava(cluster, *command))
        assert any(record["time"] < killed_at for record in step_log(storage)), "steps before the loss are not repeated"
        wait_for(lambda: worker_nodes(cluster) == {})
        output = output_of(start_raylava(cluster, *command))
        assert output.count(" reused ") == output.count("✓") == 3, "all artifacts are reused"

    uninterrupted = tmp_path / "uninterrupted"
    finish_training(start_training(recipe, copy_inputs(path, uninterrupted), processes=2))
    assert read_training(path) == read_training(uninterrupted)
