"""Fingerprints, and artifacts that become visible only once they are committed."""

import hashlib
import json
import os
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylava.artifacts import (
    LOCK_TIMEOUT_S,
    ArtifactSpec,
    _is_abandoned,
    damaged_files,
    fingerprint,
    load_artifact,
    publish_folder,
)
from raylava.cli import main
from raylava.errors import UserError
from raylava.storage import StoragePath, storage_path

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.dictionaries(st.text(max_size=6), JSON, max_size=5)


@given(FIELDS, st.randoms(use_true_random=False))
def test_fingerprint_does_not_depend_on_key_order(fields: dict[str, Any], random: Random) -> None:
    keys = list(fields)
    random.shuffle(keys)
    assert fingerprint("prepare", {key: fields[key] for key in keys}) == fingerprint("prepare", fields)


@given(FIELDS, FIELDS)
def test_fingerprints_are_equal_exactly_when_the_fields_are(first: dict[str, Any], second: dict[str, Any]) -> None:
    equal = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert (fingerprint("s", first) == fingerprint("s", second)) == equal


def test_stage_is_part_of_the_fingerprint() -> None:
    assert fingerprint("pretrain", {}) != fingerprint("finetune", {})


def test_artifact_is_found_only_after_commit(tmp_path: Path) -> None:
    spec = ArtifactSpec("prepare", {"seed": 1}, storage_path(tmp_path))
    (spec.path / "block.arrow").write_bytes(b"half")
    assert spec.find() is None
    spec.commit({"rows": 3}, {"blocks": "abc"}, seconds=1.0)
    artifact = spec.find()
    assert artifact is not None
    assert artifact.metrics == {"rows": 3}
    assert load_artifact(str(spec.path)).record["fingerprint_fields"] == {"seed": 1}


def test_loading_a_folder_that_is_no_artifact_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a complete artifact"):
        load_artifact(str(tmp_path))


def committed_model(tmp_path: Path) -> ArtifactSpec:
    """Return an artifact with a published folder, one below it, a file written in place, and a checkpoint."""
    spec = ArtifactSpec("finetune", {}, storage_path(tmp_path / "storage"))
    (tmp_path / "model" / "connector").mkdir(parents=True)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "model" / "connector" / "connector.safetensors").write_bytes(b"connector")
    publish_folder(tmp_path / "model", spec.path)
    (spec.path / "metrics.jsonl").write_bytes(b"{}")
    (spec.path / "checkpoints" / "step-1").write_bytes(b"state")
    spec.commit({}, {}, 1.0)
    return spec


def test_the_record_has_the_hash_of_every_file_of_the_result(tmp_path: Path) -> None:
    files = load_artifact(committed_model(tmp_path).path.uri).record["files"]
    assert sorted(files) == ["connector/connector.safetensors", "metrics.jsonl", "model.safetensors"]
    assert files["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()


def test_hashes_are_those_of_the_files_before_they_were_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(self: StoragePath, folder: Path) -> None:
        for file in (path for path in folder.rglob("*") if path.is_file()):
            (self / str(file.relative_to(folder))).write_bytes(file.read_bytes()[:-1])

    monkeypatch.setattr(StoragePath, "upload_folder", damage)
    spec = committed_model(tmp_path)
    damaged = damaged_files(spec.path, load_artifact(spec.path.uri).record["files"])
    assert [problem.partition(":")[0] for problem in damaged] == [
        "connector/connector.safetensors",
        "model.safetensors",
    ]


def test_verify_names_damaged_and_missing_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = committed_model(tmp_path)
    assert main(["verify", spec.path.uri]) == 0
    assert "3 files, all as they were built" in capfd.readouterr().out
    (spec.path / "model.safetensors").write_bytes(b"Weights")
    (spec.path / "metrics.jsonl").delete()
    assert main(["verify", spec.path.uri]) == 1
    output = capfd.readouterr().err
    assert "2 of 3 files are damaged" in output
    assert "metrics.jsonl: missing; model.safetensors: its SHA-256 is not the recorded one" in output


def test_content_is_on_disk_before_the_record_that_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_replace(self: Path, target: Path) -> Path:
        events.append(f"complete {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    spec = committed_model(tmp_path)
    before = events[: events.index("complete artifact.json")]
    assert {"model.safetensors", "connector.safetensors", "connector", spec.fingerprint} <= set(before)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"stage": 1}', b'{"stage": "finetune", "fingerprint": "x", "metrics": []}', b"\xff"],
    ids=["empty", "cut", "list", "types", "incomplete", "binary"],
)
def test_a_damaged_record_is_named_wherever_the_artifact_is_looked_up(content: bytes, tmp_path: Path) -> None:
    spec = committed_model(tmp_path)
    (spec.path / "artifact.json").write_bytes(content)
    with pytest.raises(UserError, match=r"artifact\.json: damaged .*; remove the folder"):
        spec.find()
    with pytest.raises(UserError, match=r"artifact\.json: damaged"):
        load_artifact(spec.path.uri)


def test_lock_of_another_host_is_abandoned_once_its_heartbeat_is_too_old() -> None:
    holder = {"identity": "x", "host": "elsewhere", "pid": 1, "started": 0.0}
    assert not _is_abandoned(holder | {"heartbeat": time.time()})
    assert _is_abandoned(holder | {"heartbeat": time.time() - 2 * LOCK_TIMEOUT_S})
