"""How far runs are, told by storage alone."""

import json
import time
from pathlib import Path

import pytest

from raylava.artifacts import ArtifactSpec, lock
from raylava.cli import main
from raylava.pipeline.status import list_artifacts
from raylava.storage import StoragePath, storage_path
from raylava.train.spec import SNAPSHOT


def training(folder: StoragePath, *, heartbeat: float | None, loss: float | None = 1.5) -> None:
    """What an unfinished finetuning leaves after twelve steps."""
    figures = {"loss": loss, "tokens_per_second": 1000.0, "seconds": 1.0, "data_wait_fraction": 0.0}
    lines = [json.dumps({"step": step} | figures) + "\n" for step in range(12)]
    (folder / "metrics.jsonl").write_bytes("".join(lines).encode() + b'{"step": 12, "lo')
    for step in (8, 10):  # of the second, part is there
        (folder / "checkpoints" / f"step-{step:08d}" / "cursor.json").write_bytes(b"{}")
    (folder / "checkpoints" / SNAPSHOT).write_bytes(
        b'{"checkpoint_results": [{"checkpoint_dir_name": "step-00000008"}]}'
    )
    if heartbeat is not None:
        (folder / "lock.json").write_bytes(json.dumps({"heartbeat": heartbeat}).encode())


@pytest.mark.parametrize(
    ("age", "state"), [(0.0, "building"), (3600.0, "stopped"), (None, "stopped")], ids=["fresh", "stale", "none"]
)
def test_an_unfinished_training_is_told_by_its_steps_its_checkpoint_and_its_lock(
    age: float | None, state: str, tmp_path: Path
) -> None:
    training(storage_path(tmp_path) / "finetune" / "abc", heartbeat=None if age is None else time.time() - age)
    (one,) = list_artifacts(storage_path(tmp_path))
    assert (one.stage, one.fingerprint, one.state) == ("finetune", "abc", state)
    assert one.detail == "step 12, loss 1.5, 1,000 tokens/s; checkpoint of step 8"


def test_a_step_that_was_not_finite_is_told(tmp_path: Path) -> None:
    training(storage_path(tmp_path) / "finetune" / "abc", heartbeat=None, loss=None)
    (one,) = list_artifacts(storage_path(tmp_path))
    assert one.detail.startswith("step 12, loss not finite")


def test_a_real_lock_counts_as_building(tmp_path: Path) -> None:
    folder = storage_path(tmp_path) / "prepare" / "abc"
    with lock(folder, "prepare"):
        (one,) = list_artifacts(storage_path(tmp_path))
        assert one.state == "building"


def test_what_is_made_is_told_with_its_time_and_the_stages_stand_in_their_order(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for stage in ("evaluate", "prepare"):
        ArtifactSpec(stage, {}, storage_path(tmp_path)).commit({"rows": 1}, {}, 12.0)
    assert [(one.stage, one.state, one.detail) for one in list_artifacts(storage_path(tmp_path))] == [
        ("prepare", "made", "in 12 s"),
        ("evaluate", "made", "in 12 s"),
    ]
    assert main(["status", "--storage", str(tmp_path)]) == 0
    assert "in storage" in capfd.readouterr().err
    assert main(["status", "--storage", str(tmp_path / "none")]) == 0
    assert "nothing there yet" in capfd.readouterr().out
