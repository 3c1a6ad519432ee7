"""An artifact is found by what made it, seen only when it is whole, and built by one run at a time."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylava.artifacts import LOCK_FILE, ArtifactSpec, fingerprint, load_artifact, lock
from raylava.errors import UserError
from raylava.storage import storage_path

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
CONTENT = st.dictionaries(st.text(max_size=6), JSON, max_size=5)


@given(CONTENT, st.randoms(use_true_random=False))
def test_a_fingerprint_does_not_depend_on_key_order(content: dict, random) -> None:  # type: ignore[no-untyped-def]
    keys = list(content)
    random.shuffle(keys)
    assert fingerprint("prepare", {key: content[key] for key in keys}) == fingerprint("prepare", content)


@given(CONTENT, CONTENT)
def test_different_content_has_a_different_fingerprint(one: dict, other: dict) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (fingerprint("s", one) == fingerprint("s", other)) == same


def test_the_stage_is_part_of_the_fingerprint() -> None:
    assert fingerprint("pretrain", {}) != fingerprint("finetune", {})


def test_an_artifact_is_found_only_once_it_is_committed(tmp_path: Path) -> None:
    spec = ArtifactSpec("prepare", {"seed": 1}, storage_path(tmp_path))
    (spec.path / "block.arrow").write_bytes(b"half")
    assert spec.find() is None
    spec.commit({"rows": 3}, {"blocks": "abc"}, seconds=1.0)
    found = spec.find()
    assert found is not None
    assert found.metrics == {"rows": 3}
    assert load_artifact(str(spec.path)).record["fingerprint_fields"] == {"seed": 1}


def test_showing_a_folder_that_is_no_artifact_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished artifact"):
        load_artifact(str(tmp_path))


def test_a_lock_left_by_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_hold_and_die, args=(tmp_path,))
    child.start()
    child.join()
    assert (tmp_path / LOCK_FILE).exists(), "the child died holding the lock"
    with lock(storage_path(tmp_path), "the stage"):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_silent_holder_on_another_host_loses_the_lock_and_a_lively_one_keeps_it(tmp_path: Path) -> None:
    from raylava.artifacts import _abandoned

    about = {"identity": "x", "host": "elsewhere", "pid": 1, "started": 0.0}
    assert not _abandoned(about | {"heartbeat": time.time()})
    assert _abandoned(about | {"heartbeat": time.time() - 3600})


def test_of_many_runs_at_once_one_builds_and_the_others_wait_for_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    runs = [context.Process(target=_build_once, args=(tmp_path,)) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0, 0, 0]
    assert (tmp_path / "builds").read_text() == "built\n"


def _hold_and_die(folder: Path) -> None:
    with lock(storage_path(folder), "the stage"):
        os._exit(9)


def _build_once(folder: Path) -> None:
    spec = ArtifactSpec("prepare", {}, storage_path(folder))
    with lock(spec.path, "the stage"):
        if spec.find() is None:
            with (folder / "builds").open("a") as log:
                log.write("built\n")
            spec.commit({}, {}, 0.0)
