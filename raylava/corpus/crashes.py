"""Finds the rows whose processing kills the process: a decoder's segmentation fault, memory that runs out.

Ray starts a dead worker's task again. Each attempt at a shard is therefore recorded in storage when it begins; once two
have ended without a result, the rows are processed in a child process that announces each, and the row at which the
child dies is recorded as crashed.
"""

import json
import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from raylava.corpus.quarantine import BadRow, Reason
from raylava.corpus.shards import SHARDS, shard_file
from raylava.errors import RunError
from raylava.storage import StoragePath

logger = logging.getLogger(__name__)

_DEATHS_BEFORE_SEARCH = 2
_MAX_DEATHS = 8  # a shard that still kills its workers is not to blame on one row
READING = -1  # announced instead of a position: rows are being read
_FINISHED = -2  # all rows were processed, or an exception ended it

Crashes = Mapping[int, str]  # position of a row in its shard → how its process died
Announce = Callable[[int], None]


class ProcessRows(Protocol):
    """Processes the rows of a shard except the crashed ones; announces READING, or a row's position, before it acts."""

    def __call__(self, crashes: Crashes, announce: Announce) -> object: ...


def announce_nothing(position: int) -> None:
    """Announce to nobody: of an attempt that is no search."""


def refuse_crashed(position: int, crashes: Crashes) -> None:
    """Raise BadRow for a row that has crashed."""
    if position in crashes:
        raise BadRow(Reason.CRASHED, f"its processing ended the process ({crashes[position]})")


@contextmanager
def shard_attempt(output: StoragePath, shard: int, task: str, process_rows: ProcessRows) -> Iterator[Crashes]:
    """Yield the crashed rows of a shard to one attempt at a task, after a search for them if two attempts died.

    `process_rows`, which must be picklable, does what the attempt does with the rows. Raises RunError when the attempts
    keep dying although no row is to blame.
    """
    file = shard_file(output, "attempts", shard, "json")
    begun, crashes = _read_attempts(file, task)
    if begun >= _MAX_DEATHS:
        raise RunError(
            f"shard {shard} killed {begun} workers, although each of its rows can be processed alone; "
            "give the workers more memory, or set samples_per_block lower, and run the command again"
        )
    _write_attempts(file, task, begun + 1, crashes)
    try:
        if begun >= _DEATHS_BEFORE_SEARCH:
            logger.warning("shard %d killed %d workers; searching for the row", shard, begun)
            for crashes in find_crashes(process_rows, crashes):  # noqa: B020 (each has all of those before it)
                _write_attempts(file, task, begun + 1, crashes)
        yield crashes
    except Exception:
        _write_attempts(file, task, begun, crashes)  # the process lives, so that no row has killed it
        raise


def reset_attempts(output: StoragePath, shards: Iterable[int]) -> None:
    """Forget the attempts of an earlier, perhaps interrupted run at these shards, but not the crashed rows."""
    names = {file.name for file in (output / SHARDS).children()}
    for file in (shard_file(output, "attempts", shard, "json") for shard in shards):
        if file.name in names:
            record = json.loads(file.read_bytes())
            file.write_bytes(json.dumps(record | {"begun": 0}).encode())


def _read_attempts(file: StoragePath, task: str) -> tuple[int, dict[int, str]]:
    """Return the number of attempts at the task that began, and the crashed rows that any task has found."""
    try:
        record = json.loads(file.read_bytes())
    except FileNotFoundError:
        return 0, {}
    crashes = {int(position): death for position, death in record["crashes"].items()}
    return record["begun"] if record["task"] == task else 0, crashes


def _write_attempts(file: StoragePath, task: str, begun: int, crashes: Crashes) -> None:
    file.write_bytes(json.dumps({"task": task, "begun": begun, "crashes": dict(crashes)}).encode())


def find_crashes(process_rows: ProcessRows, known: Crashes) -> Iterator[dict[int, str]]:
    """Yield the rows that kill a process, beyond those that are known, after each that is found.

    Raises RunError when reading the rows kills a process.
    """
    crashes = dict(known)
    while True:
        position, death = _process_in_child(process_rows, crashes)
        if death is None:
            return
        if position == READING:
            raise RunError(f"reading the rows of a shard ends its process ({death}); the file may be damaged")
        logger.warning("row %d of the shard ends its process (%s)", position, death)
        crashes[position] = death
        yield dict(crashes)


def _process_in_child(process_rows: ProcessRows, crashes: Crashes) -> tuple[int, str | None]:
    """Process the rows in a child; return the last announced position and how the child died, None if it did not.

    An exception in the child is no death: the attempt itself will meet and report it.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks that other threads hold
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_announce_rows, args=(process_rows, crashes, sender), name="find-crashes")
    child.start()
    sender.close()
    position, announced = READING, READING
    try:
        while announced != _FINISHED:
            position, announced = announced, receiver.recv()
    except EOFError:
        child.join()
        status = child.exitcode or 0
        return announced, signal.Signals(-status).name if status < 0 else f"exit status {status}"
    child.join()
    return position, None


def _announce_rows(process_rows: ProcessRows, crashes: Crashes, sender: Connection) -> None:
    """Process the rows as a child. If the memory runs out, the system ends the child rather than the worker."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        process_rows(crashes, sender.send)
    except Exception as error:
        logger.info("the search for crashes ended", exc_info=error)
    sender.send(_FINISHED)
