"""The lock of an artifact between processes: one builds, dead holders are replaced."""

import json
import multiprocessing
import os
from pathlib import Path

from raylava.artifacts import LOCK_FILE, ArtifactSpec, lock
from raylava.storage import storage_path


def test_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_lock_and_die, args=(tmp_path,))
    child.start()
    child.join()
    assert (tmp_path / LOCK_FILE).exists(), "the child died holding the lock"
    with lock(storage_path(tmp_path), "the stage"):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()


def test_one_of_several_simultaneous_runs_builds_and_the_others_wait(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    runs = [context.Process(target=_build_once, args=(tmp_path,)) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0, 0, 0]
    assert (tmp_path / "builds").read_text() == "built\n"


def _lock_and_die(folder: Path) -> None:
    with lock(storage_path(folder), "the stage"):
        os._exit(9)


def _build_once(folder: Path) -> None:
    spec = ArtifactSpec("prepare", {}, storage_path(folder))
    with lock(spec.path, "the stage"):
        if spec.find() is None:
            with (folder / "builds").open("a") as log:
                log.write("built\n")
            spec.commit({}, {}, 0.0)
