"""The status of artifacts, read from storage alone."""

import json
import time
from pathlib import Path

import pytest

from raylava.artifacts import ArtifactSpec, lock
from raylava.cli import main
from raylava.pipeline.status import list_artifacts
from raylava.storage import StoragePath, storage_path
from raylava.train.step_log import SNAPSHOT


def write_incomplete_training(folder: StoragePath, *, heartbeat: float | None, loss: float | None = 1.5) -> None:
    """Write what an incomplete finetuning run leaves after twelve steps: a truncated line, a checkpoint in upload."""
    metrics = {"loss": loss, "tokens_per_second": 1000.0, "step_time_s": 1.0, "data_wait_fraction": 0.0}
    lines = [json.dumps({"step": step} | metrics) + "\n" for step in range(12)]
    (folder / "metrics.jsonl").write_bytes("".join(lines).encode() + b'{"step": 12, "lo')
    for step in (8, 10):  # the second is incomplete
        (folder / "checkpoints" / f"step-{step:08d}" / "checkpoint.json").write_bytes(b"{}")
    (folder / "checkpoints" / SNAPSHOT).write_bytes(
        b'{"checkpoint_results": [{"checkpoint_dir_name": "step-00000008"}]}'
    )
    if heartbeat is not None:
        (folder / "lock.json").write_bytes(json.dumps({"heartbeat": heartbeat}).encode())


@pytest.mark.parametrize(
    ("age", "state"), [(0.0, "building"), (3600.0, "stopped"), (None, "stopped")], ids=["fresh", "stale", "none"]
)
def test_incomplete_training_shows_its_step_checkpoint_and_whether_it_is_being_built(
    age: float | None, state: str, tmp_path: Path
) -> None:
    folder = storage_path(tmp_path) / "finetune" / "abc"
    write_incomplete_training(folder, heartbeat=None if age is None else time.time() - age)
    (status,) = list_artifacts(storage_path(tmp_path))
    assert (status.stage, status.fingerprint, status.state) == ("finetune", "abc", state)
    assert status.detail == "step 12, loss 1.5, 1,000 tokens/s; checkpoint of step 8"


def test_non_finite_loss_is_shown(tmp_path: Path) -> None:
    write_incomplete_training(storage_path(tmp_path) / "finetune" / "abc", heartbeat=None, loss=None)
    (status,) = list_artifacts(storage_path(tmp_path))
    assert status.detail.startswith("step 12, loss not finite")


def test_locked_artifact_is_being_built(tmp_path: Path) -> None:
    folder = storage_path(tmp_path) / "prepare" / "abc"
    with lock(folder, "prepare"):
        (status,) = list_artifacts(storage_path(tmp_path))
        assert status.state == "building"


def test_complete_artifacts_are_listed_in_stage_order(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for stage in ("evaluate", "prepare"):
        ArtifactSpec(stage, {}, storage_path(tmp_path)).commit({"rows": 1}, {}, 12.0)
    statuses = list_artifacts(storage_path(tmp_path))
    assert [(status.stage, status.state, status.detail) for status in statuses] == [
        ("prepare", "complete", "in 12 s"),
        ("evaluate", "complete", "in 12 s"),
    ]
    assert main(["status", "--storage", str(tmp_path)]) == 0
    assert "in storage" in capfd.readouterr().err
    assert main(["status", "--storage", str(tmp_path / "none")]) == 0
    assert "no artifacts yet" in capfd.readouterr().out


def test_a_damaged_record_or_lock_is_shown_beside_the_other_artifacts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = storage_path(tmp_path)
    ArtifactSpec("prepare", {"seed": 1}, root).commit({}, {}, 1.0)
    (root / "prepare" / "damaged" / "artifact.json").write_bytes(b'{"stage": ')
    (root / "prepare" / "unlocked" / "lock.json").write_bytes(b"")
    states = {status.fingerprint: status.state for status in list_artifacts(root)}
    assert sorted(states.values()) == ["complete", "damaged", "stopped"]
    assert states["damaged"] == "damaged"
    assert main(["status", "--storage", str(tmp_path)]) == 0
    assert "artifact.json: damaged" in " ".join(capfd.readouterr().err.split())
