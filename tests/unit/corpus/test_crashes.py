"""Rows that kill their process are found after two deaths, and only then."""

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylava.corpus import crashes
from raylava.corpus.crashes import READING, Announce, Crashes, reset_attempts, shard_attempt
from raylava.errors import RunError
from raylava.storage import StoragePath, storage_path

EXIT = 99  # instead of a signal: the process exits, as C libraries do


class Death(BaseException):
    """Ends an attempt as the death of its process would: nothing that it does on an exception is done."""


def process_rows(deadly: dict[int, int], crashes: Crashes, announce: Announce) -> None:
    """Process ten rows; a deadly one sends its signal to the process, or raises if it has none."""
    for position in (READING, *range(10)):
        announce(position)
        if position in deadly and position not in crashes:
            if not deadly[position]:
                raise ZeroDivisionError
            if deadly[position] == EXIT:
                os._exit(3)
            os.kill(os.getpid(), deadly[position])


NOTHING = functools.partial(process_rows, {})


def attempt(output: StoragePath, deadly: dict[int, int], task: str = "block") -> Crashes | None:
    """Return the crashes that an attempt is told of; None if the attempt itself dies."""
    with shard_attempt(output, 3, task, functools.partial(process_rows, deadly)) as found:
        dies = any(signal and position not in found for position, signal in deadly.items())
        if dies:
            raise Death  # the record stays as a death leaves it
        return dict(found)


def attempt_until_done(output: StoragePath, deadly: dict[int, int]) -> tuple[int, Crashes]:
    """Return the number of attempts that died, and the crashes that the last was told of."""
    for deaths in range(9):
        try:
            found = attempt(output, deadly)
        except Death:
            continue
        assert found is not None
        return deaths, found
    raise AssertionError("the attempts keep dying")


def test_every_deadly_row_is_found_after_the_second_death(tmp_path: Path) -> None:
    assert attempt_until_done(storage_path(tmp_path), {2: 6, 7: 9}) == (2, {2: "SIGABRT", 7: "SIGKILL"})


def test_no_child_is_started_while_no_attempt_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crashes, "find_crashes", lambda *_: pytest.fail("searched"))
    for _ in range(4):  # a task whose last attempt ended with a result is not attempted again, except for another task
        assert attempt(storage_path(tmp_path), {}, task=f"keys {_}") == {}


def test_exception_in_an_attempt_is_no_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crashes, "find_crashes", lambda *_: pytest.fail("searched"))
    for _ in range(4):
        with pytest.raises(ZeroDivisionError), shard_attempt(storage_path(tmp_path), 3, "block", process_rows):  # type: ignore[arg-type]
            raise ZeroDivisionError


def test_exception_in_the_child_does_not_accuse_a_row(tmp_path: Path) -> None:
    assert list(crashes.find_crashes(functools.partial(process_rows, {4: 0}), {})) == []


def test_rows_that_one_task_has_found_are_known_to_the_next(tmp_path: Path) -> None:
    attempt_until_done(storage_path(tmp_path), {2: 6})
    assert attempt(storage_path(tmp_path), {2: 6}, task="another") == {2: "SIGABRT"}


def test_death_while_rows_are_read_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"reading the rows of a shard ends its process \(SIGSEGV\)"):
        list(crashes.find_crashes(functools.partial(process_rows, {READING: 11}), {}))


def test_attempts_that_keep_dying_without_a_deadly_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crashes, "find_crashes", lambda process, known: iter(()))
    for _ in range(8):
        with pytest.raises(Death):
            attempt(storage_path(tmp_path), {2: 9})
    with pytest.raises(RunError, match="shard 3 killed 8 workers, although each of its rows can be processed alone"):
        attempt(storage_path(tmp_path), {2: 9})


def test_row_that_exits_its_process_is_found_like_one_that_kills_it(tmp_path: Path) -> None:
    assert attempt_until_done(storage_path(tmp_path), {4: EXIT}) == (2, {4: "exit status 3"})


def test_found_rows_are_kept_if_the_search_itself_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed_after_one(process: object, known: Crashes) -> Iterator[Crashes]:
        yield {2: "SIGABRT"}
        raise Death

    for _ in range(2):
        with pytest.raises(Death):
            attempt(storage_path(tmp_path), {2: 6})
    monkeypatch.setattr(crashes, "find_crashes", killed_after_one)
    with pytest.raises(Death):
        attempt(storage_path(tmp_path), {2: 6})
    record = json.loads((tmp_path / "rows" / "attempts-00003.json").read_text())
    assert record == {"task": "block", "begun": 3, "crashes": {"2": "SIGABRT"}}


def test_a_new_run_begins_to_count_anew_but_knows_the_crashed_rows(tmp_path: Path) -> None:
    for _ in range(7):
        with pytest.raises(Death), shard_attempt(storage_path(tmp_path), 3, "block", NOTHING):
            raise Death
    attempt_until_done(storage_path(tmp_path), {2: 6})
    reset_attempts(storage_path(tmp_path), [3, 4])
    record = json.loads((tmp_path / "rows" / "attempts-00003.json").read_text())
    assert (record["begun"], record["crashes"]) == (0, {"2": "SIGABRT"})
