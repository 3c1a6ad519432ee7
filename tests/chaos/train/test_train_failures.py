"""What befalls a run changes nothing: the same steps, the same losses, the same weights as one left in peace."""

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raylava.config.recipe import CheckpointConfig, Model, Training, ZeroConfig
from raylava.corpus.blocks import Blocks
from raylava.models.registry import LanguageSpec, VisionSpec
from raylava.storage import storage_path
from raylava.train.spec import CHECKPOINTS, SNAPSHOT, TrainSpec
from raylava.train.step_log import STEP_LOG
from tests.support.flaky_proxy import FlakyProxy
from tests.support.processes import kill_with_children

pytestmark = pytest.mark.slow

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def spec(toy_model: Model, vision: VisionSpec, language: LanguageSpec, prepared_blocks: Blocks) -> TrainSpec:
    """48 steps over 48 samples, a checkpoint after every eighth."""
    return TrainSpec(
        stage="finetune",
        model=toy_model,
        vision=vision,
        language=language,
        training=Training(
            epochs=8,
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


def start(spec: TrainSpec, **given: Any) -> "subprocess.Popen[str]":
    script = str(Path(__file__).parent / "driver.py")
    arguments = json.dumps({"spec": pickle.dumps(spec).hex(), "workers": 2} | given)
    return subprocess.Popen(
        [sys.executable, script, arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )


def finish(run: "subprocess.Popen[str]") -> None:
    _, error = run.communicate(timeout=400)
    assert run.returncode == 0, error[-4000:]


def train_to_the_end(spec: TrainSpec, **given: Any) -> Lines:
    finish(start(spec, **given))
    return ledger(spec)


def ledger(spec: TrainSpec) -> Lines:
    return [json.loads(line) for line in (storage_path(spec.output) / STEP_LOG).read_bytes().splitlines()]


def weights(spec: TrainSpec) -> bytes:
    return (storage_path(spec.output) / "model.safetensors").read_bytes()


def proof(lines: Lines) -> list[tuple[int, str, float]]:
    return [(line["step"], line["samples_sha256"], line["loss"]) for line in lines]


def at(spec: TrainSpec, folder: Path | str, zero_stage: int = 2) -> TrainSpec:
    training = spec.training.model_copy(update={"zero": ZeroConfig(stage=zero_stage)})
    return dataclasses.replace(spec, output=str(folder), training=training)


def wait_for(run: "subprocess.Popen[str]", once: Callable[[], bool]) -> None:
    """Until something is true of a run that goes on."""
    deadline = time.monotonic() + 180
    while not once():
        assert run.poll() is None, run.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_all(run: "subprocess.Popen[str]", once: Callable[[], bool]) -> None:
    """SIGKILL the driver and its whole cluster as soon as something is true."""
    wait_for(run, once)
    kill_with_children(run)


def has_checkpoint(spec: TrainSpec) -> bool:
    snapshot = storage_path(spec.output) / CHECKPOINTS / SNAPSHOT
    return snapshot.exists() and b"step-" in snapshot.read_bytes()


@pytest.fixture(scope="module")
def peaceful(spec: TrainSpec, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainSpec, Lines]:
    """The run that nothing befell, on two workers."""
    spec = at(spec, tmp_path_factory.mktemp("peaceful") / "run")
    return spec, train_to_the_end(spec)


def check_the_same(spec: TrainSpec, lines: Lines, peaceful: tuple[TrainSpec, Lines]) -> None:
    reference, expected = peaceful
    assert proof(lines) == proof(expected), "the same samples and, to the bit, the same losses in each step"
    assert weights(spec) == weights(reference)


def test_a_worker_killed_on_the_way_changes_nothing(
    spec: TrainSpec, peaceful: tuple[TrainSpec, Lines], tmp_path: Path
) -> None:
    spec = at(spec, tmp_path / "run")
    check_the_same(spec, train_to_the_end(spec, then="kill_worker"), peaceful)


def test_the_driver_killed_and_started_again_changes_nothing(
    spec: TrainSpec, peaceful: tuple[TrainSpec, Lines], tmp_path: Path
) -> None:
    spec = at(spec, tmp_path / "run")
    kill_all(start(spec), once=lambda: has_checkpoint(spec))
    lines = train_to_the_end(spec)
    check_the_same(spec, lines, peaceful)


def test_a_node_lost_without_notice_is_survived_on_fewer_workers(
    spec: TrainSpec, peaceful: tuple[TrainSpec, Lines], tmp_path: Path
) -> None:
    spec = at(spec, tmp_path / "run")
    lines = train_to_the_end(spec, nodes=2, min_workers=1, then="remove_node")
    check_the_same_samples(lines, peaceful[1])
    assert [lines[0]["world_size"], lines[-1]["world_size"]] == [2, 1]


def test_a_node_that_gives_notice_is_left_with_a_checkpoint_in_time(
    spec: TrainSpec, peaceful: tuple[TrainSpec, Lines], tmp_path: Path
) -> None:
    spec = at(spec, tmp_path / "run")
    lines = train_to_the_end(spec, nodes=2, min_workers=1, then="drain_node")
    check_the_same_samples(lines, peaceful[1])
    assert [lines[0]["world_size"], lines[-1]["world_size"]] == [2, 1]


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_run_goes_on_with_more_workers(
    zero_stage: int, spec: TrainSpec, peaceful: tuple[TrainSpec, Lines], tmp_path: Path
) -> None:
    spec = at(spec, tmp_path / "run", zero_stage)
    kill_all(start(spec, workers=1), once=lambda: has_checkpoint(spec))
    lines = train_to_the_end(spec, workers=2)
    check_the_same_samples(lines, peaceful[1])
    assert [lines[0]["world_size"], lines[-1]["world_size"]] == [1, 2]


def check_the_same_samples(lines: Lines, expected: Lines) -> None:
    """On another number of workers sums are rounded otherwise: losses agree to 1e-4, samples exactly."""
    assert [line["samples_sha256"] for line in lines] == [line["samples_sha256"] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-4)


def test_a_run_killed_while_a_checkpoint_uploads_goes_on_from_the_whole_one_before(
    spec: TrainSpec, peaceful: tuple[TrainSpec, Lines], proxy: FlakyProxy, s3: str
) -> None:
    spec = at(spec, f"{s3}/killed-uploading")
    proxy.mode, proxy.only = "hanging", "step-00000016/state/zero_pp_rank_1"  # the other rank's part gets through
    half = storage_path(spec.output) / CHECKPOINTS / "step-00000016"
    kill_all(start(spec), once=lambda: bool(proxy.failed) and any(half.walk_files()) and has_checkpoint(spec))
    killed = time.time()
    proxy.mode = "well"
    lines = train_to_the_end(spec)
    check_the_same(spec, lines, peaceful)
    assert [line["step"] for line in lines if line["time"] < killed] == list(range(8))


def test_training_goes_on_while_storage_fails_and_ends_as_if_it_had_not(
    spec: TrainSpec, peaceful: tuple[TrainSpec, Lines], proxy: FlakyProxy, s3: str
) -> None:
    spec = at(spec, f"{s3}/failing-for-a-while")
    proxy.mode, proxy.only = "refusing", "step-00000008"
    run = start(spec)
    wait_for(run, lambda: len(proxy.failed) > 20)
    proxy.mode = "well"
    finish(run)
    lines = ledger(spec)
    check_the_same(spec, lines, peaceful)
    assert any(proxy.failed[0] < line["time"] < proxy.failed[-1] for line in lines), (
        "steps were done poll_in_background"
    )


def test_storage_that_fails_for_good_ends_the_run_with_the_last_good_checkpoint_named(
    spec: TrainSpec, proxy: FlakyProxy, s3: str
) -> None:
    training = spec.training.model_copy(
        update={"checkpoint": CheckpointConfig(interval_steps=8, upload_timeout_minutes=0.02)}
    )
    spec = dataclasses.replace(spec, training=training, output=f"{s3}/failing-for-good")
    proxy.mode, proxy.only = "refusing", "step-00000016"
    run = start(spec)
    _, told = run.communicate(timeout=400)
    assert run.returncode != 0
    assert "RunError" in told.splitlines()[-1]
    assert re.search(r"could not be written to .*step-00000016.*the last good checkpoint is .*step-00000008", told)
