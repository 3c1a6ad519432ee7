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

from raylava.corpus.blocks import Blocks
from raylava.model.backbones import LanguageSpec, VisionSpec
from raylava.recipe import Checkpoints, Model, Training, Zero
from raylava.storage import place
from raylava.train.job import CHECKPOINTS, SNAPSHOT, TrainJob
from raylava.train.ledger import LEDGER
from tests.flaky import FlakyProxy
from tests.processes import kill_with_children

pytestmark = pytest.mark.slow

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def job(micro_model: Model, vision: VisionSpec, language: LanguageSpec, prepared_blocks: Blocks) -> TrainJob:
    """48 steps over 48 samples, a checkpoint after every eighth."""
    return TrainJob(
        stage="finetune",
        model=micro_model,
        vision=vision,
        language=language,
        training=Training(
            epochs=8,
            global_batch=8,
            lr=1e-3,
            clip_norm=1.0,
            precision="fp32",
            pack_tokens=384,
            zero=Zero(stage=2),
            checkpoints=Checkpoints(every_steps=8),
        ),
        seed=0,
        blocks=str(prepared_blocks.folder),
        connector=None,
        fit="pad",
        output="",
    )


def start(job: TrainJob, **given: Any) -> "subprocess.Popen[str]":
    script = str(Path(__file__).parent / "driver.py")
    arguments = json.dumps({"job": pickle.dumps(job).hex(), "workers": 2} | given)
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


def train_to_the_end(job: TrainJob, **given: Any) -> Lines:
    finish(start(job, **given))
    return ledger(job)


def ledger(job: TrainJob) -> Lines:
    return [json.loads(line) for line in (place(job.output) / LEDGER).read_bytes().splitlines()]


def weights(job: TrainJob) -> bytes:
    return (place(job.output) / "model.safetensors").read_bytes()


def proof(lines: Lines) -> list[tuple[int, str, float]]:
    return [(line["step"], line["samples_sha256"], line["loss"]) for line in lines]


def at(job: TrainJob, folder: Path | str, zero_stage: int = 2) -> TrainJob:
    training = job.training.model_copy(update={"zero": Zero(stage=zero_stage)})
    return dataclasses.replace(job, output=str(folder), training=training)


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


def has_checkpoint(job: TrainJob) -> bool:
    snapshot = place(job.output) / CHECKPOINTS / SNAPSHOT
    return snapshot.exists() and b"step-" in snapshot.read_bytes()


@pytest.fixture(scope="module")
def peaceful(job: TrainJob, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainJob, Lines]:
    """The run that nothing befell, on two workers."""
    job = at(job, tmp_path_factory.mktemp("peaceful") / "run")
    return job, train_to_the_end(job)


def check_the_same(job: TrainJob, lines: Lines, peaceful: tuple[TrainJob, Lines]) -> None:
    reference, expected = peaceful
    assert proof(lines) == proof(expected), "the same samples and, to the bit, the same losses in each step"
    assert weights(job) == weights(reference)


def test_a_worker_killed_on_the_way_changes_nothing(
    job: TrainJob, peaceful: tuple[TrainJob, Lines], tmp_path: Path
) -> None:
    job = at(job, tmp_path / "run")
    check_the_same(job, train_to_the_end(job, then="kill_worker"), peaceful)


def test_the_driver_killed_and_started_again_changes_nothing(
    job: TrainJob, peaceful: tuple[TrainJob, Lines], tmp_path: Path
) -> None:
    job = at(job, tmp_path / "run")
    kill_all(start(job), once=lambda: has_checkpoint(job))
    lines = train_to_the_end(job)
    check_the_same(job, lines, peaceful)


def test_a_node_lost_without_notice_is_survived_on_fewer_workers(
    job: TrainJob, peaceful: tuple[TrainJob, Lines], tmp_path: Path
) -> None:
    job = at(job, tmp_path / "run")
    lines = train_to_the_end(job, nodes=2, min_workers=1, then="remove_node")
    check_the_same_samples(lines, peaceful[1])
    assert [lines[0]["world_size"], lines[-1]["world_size"]] == [2, 1]


def test_a_node_that_gives_notice_is_left_with_a_checkpoint_in_time(
    job: TrainJob, peaceful: tuple[TrainJob, Lines], tmp_path: Path
) -> None:
    job = at(job, tmp_path / "run")
    lines = train_to_the_end(job, nodes=2, min_workers=1, then="drain_node")
    check_the_same_samples(lines, peaceful[1])
    assert [lines[0]["world_size"], lines[-1]["world_size"]] == [2, 1]


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_run_goes_on_with_more_workers(
    zero_stage: int, job: TrainJob, peaceful: tuple[TrainJob, Lines], tmp_path: Path
) -> None:
    job = at(job, tmp_path / "run", zero_stage)
    kill_all(start(job, workers=1), once=lambda: has_checkpoint(job))
    lines = train_to_the_end(job, workers=2)
    check_the_same_samples(lines, peaceful[1])
    assert [lines[0]["world_size"], lines[-1]["world_size"]] == [1, 2]


def check_the_same_samples(lines: Lines, expected: Lines) -> None:
    """On another number of workers sums are rounded otherwise: losses agree to 1e-4, samples exactly."""
    assert [line["samples_sha256"] for line in lines] == [line["samples_sha256"] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-4)


def test_a_run_killed_while_a_checkpoint_uploads_goes_on_from_the_whole_one_before(
    job: TrainJob, peaceful: tuple[TrainJob, Lines], proxy: FlakyProxy, s3: str
) -> None:
    job = at(job, f"{s3}/killed-uploading")
    proxy.mode, proxy.only = "hanging", "step-00000016/state/zero_pp_rank_1"  # the other rank's part gets through
    half = place(job.output) / CHECKPOINTS / "step-00000016"
    kill_all(start(job), once=lambda: bool(proxy.failed) and any(half.files_below()) and has_checkpoint(job))
    killed = time.time()
    proxy.mode = "well"
    lines = train_to_the_end(job)
    check_the_same(job, lines, peaceful)
    assert [line["step"] for line in lines if line["time"] < killed] == list(range(8))


def test_training_goes_on_while_storage_fails_and_ends_as_if_it_had_not(
    job: TrainJob, peaceful: tuple[TrainJob, Lines], proxy: FlakyProxy, s3: str
) -> None:
    job = at(job, f"{s3}/failing-for-a-while")
    proxy.mode, proxy.only = "refusing", "step-00000008"
    run = start(job)
    wait_for(run, lambda: len(proxy.failed) > 20)
    proxy.mode = "well"
    finish(run)
    lines = ledger(job)
    check_the_same(job, lines, peaceful)
    assert any(proxy.failed[0] < line["time"] < proxy.failed[-1] for line in lines), "steps were done meanwhile"


def test_storage_that_fails_for_good_ends_the_run_with_the_last_good_checkpoint_named(
    job: TrainJob, proxy: FlakyProxy, s3: str
) -> None:
    training = job.training.model_copy(update={"checkpoints": Checkpoints(every_steps=8, retry_minutes=0.02)})
    job = dataclasses.replace(job, training=training, output=f"{s3}/failing-for-good")
    proxy.mode, proxy.only = "refusing", "step-00000016"
    run = start(job)
    _, told = run.communicate(timeout=400)
    assert run.returncode != 0
    assert "RunError" in told.splitlines()[-1]
    assert re.search(r"could not be written to .*step-00000016.*the last good checkpoint is .*step-00000008", told)
