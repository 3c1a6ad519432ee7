"""Failures change nothing: the same samples, losses and weights as in an uninterrupted run."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from raylava.config.recipe import CheckpointConfig, Resources, Training, ZeroConfig
from raylava.corpus.blocks import Blocks
from raylava.errors import RunError
from raylava.models.registry import ResolvedModel
from raylava.progress import NullProgressBar
from raylava.storage import storage_path
from raylava.train.ray.driver import run
from raylava.train.spec import TrainSpec
from raylava.train.step_log import CHECKPOINTS, STEP_LOG
from tests.support.flaky_proxy import FlakyProxy
from tests.support.processes import kill_with_children
from tests.support.train_driver import complete_checkpoints, kill_worker_after_checkpoint

Lines = list[dict[str, Any]]

SCRIPT = Path(__file__).parents[2] / "support" / "train_driver.py"


@pytest.fixture(scope="module")
def spec(resolved_model: ResolvedModel, prepared_blocks: Blocks) -> TrainSpec:
    """72 steps over 48 samples, with a checkpoint after every eighth."""
    return TrainSpec(
        stage="finetune",
        model=resolved_model,
        training=Training(
            epochs=12,
            global_batch_size=8,
            lr=1e-3,
            max_grad_norm=1.0,
            precision="fp32",
            max_tokens_per_pack=384,
            zero=ZeroConfig(stage=2),
            checkpoint=CheckpointConfig(interval_steps=8),
        ),
        seed=0,
        blocks=str(prepared_blocks.folder),
        connector=None,
        image_aspect="pad",
        output="",
    )


def start(spec: TrainSpec, **options: Any) -> "subprocess.Popen[str]":
    """Start the driver of tests/support/train_driver.py, with two workers by default."""
    arguments = json.dumps({"spec": pickle.dumps(spec).hex(), "workers": 2} | options)
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )


def finish(driver: "subprocess.Popen[str]") -> None:
    _, error = driver.communicate(timeout=400)
    assert driver.returncode == 0, error[-4000:]


def train(spec: TrainSpec) -> Lines:
    """Train to the end with two workers on the session's Ray cluster; return the step log."""
    run(spec, Resources(workers=2), NullProgressBar())
    return read_step_log(spec)


def train_on_nodes(spec: TrainSpec, failure: str) -> Lines:
    """Train on a cluster of two nodes, one of which is lost; one worker suffices. Return the step log."""
    finish(start(spec, nodes=2, min_workers=1, failure=failure))
    return read_step_log(spec)


def read_step_log(spec: TrainSpec) -> Lines:
    return [json.loads(line) for line in (storage_path(spec.output) / STEP_LOG).read_bytes().splitlines()]


def read_weights(spec: TrainSpec) -> bytes:
    return (storage_path(spec.output) / "model.safetensors").read_bytes()


def samples_and_losses(lines: Lines) -> list[tuple[int, str, float]]:
    return [(line["step"], line["samples_sha256"], line["loss"]) for line in lines]


def with_output(spec: TrainSpec, folder: Path | str, zero_stage: int = 2) -> TrainSpec:
    training = spec.training.model_copy(update={"zero": ZeroConfig(stage=zero_stage)})
    return dataclasses.replace(spec, output=str(folder), training=training)


def wait_until(condition: Callable[[], bool], driver: "subprocess.Popen[str]") -> None:
    """Wait until the condition holds while the driver runs."""
    deadline = time.monotonic() + 180
    while not condition():
        assert driver.poll() is None, driver.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_cluster_when(condition: Callable[[], bool], driver: "subprocess.Popen[str]") -> None:
    """SIGKILL the driver and its whole cluster as soon as the condition holds."""
    wait_until(condition, driver)
    kill_with_children(driver)


def has_checkpoint(spec: TrainSpec) -> bool:
    return bool(complete_checkpoints(storage_path(spec.output)))


@pytest.fixture(scope="module")
def uninterrupted_run(
    spec: TrainSpec, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainSpec, Lines]:
    """A run on two workers without any failure."""
    spec = with_output(spec, tmp_path_factory.mktemp("uninterrupted") / "run")
    return spec, train(spec)


def check_identical(spec: TrainSpec, lines: Lines, uninterrupted_run: tuple[TrainSpec, Lines]) -> None:
    reference, expected = uninterrupted_run
    assert samples_and_losses(lines) == samples_and_losses(expected), "same samples and bitwise identical losses"
    assert read_weights(spec) == read_weights(reference)


def check_same_samples(lines: Lines, expected: Lines) -> None:
    """Another world size rounds sums differently: losses agree to 1e-4, samples exactly."""
    assert [line["samples_sha256"] for line in lines] == [line["samples_sha256"] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-4)


def test_resume_after_worker_kill_is_bitwise_identical(
    spec: TrainSpec, uninterrupted_run: tuple[TrainSpec, Lines], tmp_path: Path
) -> None:
    spec = with_output(spec, tmp_path / "run")
    killed: list[int] = []
    failure = threading.Thread(target=lambda: killed.append(kill_worker_after_checkpoint(spec)), daemon=True)
    failure.start()
    lines = train(spec)
    assert killed, "the run ended before a worker was killed"
    check_identical(spec, lines, uninterrupted_run)


def test_training_continues_on_fewer_workers_after_a_node_is_lost_without_notice(
    spec: TrainSpec, uninterrupted_run: tuple[TrainSpec, Lines], tmp_path: Path
) -> None:
    spec = with_output(spec, tmp_path / "run")
    lines = train_on_nodes(spec, "remove_node")
    check_same_samples(lines, uninterrupted_run[1])
    assert [lines[0]["world_size"], lines[-1]["world_size"]] == [2, 1]


def test_node_whose_gpu_fails_is_avoided_and_the_samples_stay_the_same(
    spec: TrainSpec, uninterrupted_run: tuple[TrainSpec, Lines], tmp_path: Path
) -> None:
    spec = with_output(spec, tmp_path / "run")
    driver = start(spec, nodes=2, min_workers=1, failure="break_gpu")
    _, log = driver.communicate(timeout=400)
    assert driver.returncode == 0, log[-4000:]
    warnings = [line for line in log.splitlines() if "resuming on other nodes" in line]
    assert len(warnings) == 1
    assert "CUDA error: uncorrectable ECC error encountered" in warnings[0]
    lines = read_step_log(spec)
    check_same_samples(lines, uninterrupted_run[1])
    assert [lines[0]["world_size"], lines[-1]["world_size"]] == [2, 1]


def test_killed_run_resumes_on_more_workers_and_continues_on_fewer_after_a_preemption_notice(
    spec: TrainSpec, uninterrupted_run: tuple[TrainSpec, Lines], tmp_path: Path
) -> None:
    """At ZeRO stage 3; tests/ray/train/test_engine.py covers the other stages."""
    spec = with_output(spec, tmp_path / "run", zero_stage=3)
    kill_cluster_when(lambda: has_checkpoint(spec), start(spec, workers=1))
    lines = train_on_nodes(spec, "drain_node")
    check_same_samples(lines, uninterrupted_run[1])
    assert [size for size, _ in groupby(line["world_size"] for line in lines)] == [1, 2, 1]


def test_failing_storage_and_a_kill_during_an_upload_change_nothing(
    spec: TrainSpec, uninterrupted_run: tuple[TrainSpec, Lines], proxy: FlakyProxy, s3: str
) -> None:
    """Storage refuses the first checkpoint for a while; during the upload of the third, the cluster is killed."""
    spec = with_output(spec, f"{s3}/finetune/killed-uploading")
    proxy.mode, proxy.only = "refusing", "step-00000008"
    driver = start(spec)
    wait_until(lambda: len(proxy.failed) > 20, driver)
    refused_from, refused_to = proxy.failed[0], proxy.failed[-1]
    proxy.failed.clear()
    proxy.mode, proxy.only = "hanging", "step-00000024/state/zero_pp_rank_1"  # the part of the other rank is uploaded
    output = storage_path(spec.output)
    partial = output / CHECKPOINTS / "step-00000024"
    kill_cluster_when(
        lambda: bool(proxy.failed) and any(partial.walk_files()) and "step-00000016" in complete_checkpoints(output),
        driver,
    )
    killed_at = time.time()
    proxy.mode = "well"
    finish(start(spec))
    lines = read_step_log(spec)
    check_identical(spec, lines, uninterrupted_run)
    assert [line["step"] for line in lines if line["time"] < killed_at] == list(range(16)), "resumed from a partial one"
    assert any(refused_from < line["time"] < refused_to for line in lines), "steps ran while storage refused"


def test_permanent_storage_failure_ends_the_run_and_names_the_last_good_checkpoint(
    spec: TrainSpec, ray_cluster: None, tmp_path: Path
) -> None:
    checkpoint = CheckpointConfig(interval_steps=8, upload_timeout_minutes=0.02)
    training = spec.training.model_copy(update={"checkpoint": checkpoint})
    spec = dataclasses.replace(spec, training=training, output=str(tmp_path))
    (tmp_path / CHECKPOINTS).mkdir()
    (tmp_path / CHECKPOINTS / "step-00000016").write_text("a file where the folder of the second checkpoint must be")
    message = r"could not be written to .*step-00000016.*the last good checkpoint is .*step-00000008"
    with pytest.raises(RunError, match=message):
        train(spec)
