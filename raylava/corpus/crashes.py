"""Finds the rows whose processing kills the process: a decoder's segmentation fault, memory that runs out.

Ray starts a dead worker's task again. Each attempt at a shard is therefore recorded in storage when it begins; once two
have ended without a result, the rows are processed in a child process that announces each, and the row at which the
child dies is recorded as crashed.
"""

import json
import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Protocol

from raylava.corpus.shards import shard_file
from raylava.errors import RunError
from raylava.storage import StoragePath

logger = logging.getLogger(__name__)

_DEATHS_BEFORE_SEARCH = 2
_MAX_DEATHS = 8  # a shard that still kills its workers is not to blame on one row
READING = -1  # announced instead of a position: rows are being read

Crashes = Mapping[int, str]  # position of a row in its shard → how its process died
Announce = Callable[[int], None]


class ProcessRows(Protocol):
    """Processes the rows of a shard except the crashed ones; announces READING, or a row's position, before it acts."""

    def __call__(self, crashes: Crashes, announce: Announce) -> object: ...


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
            "give the workers more memory, or set samples_per_block lower"
        )
    if begun >= _DEATHS_BEFORE_SEARCH:
        logger.warning("shard %d killed %d workers; searching for the row", shard, begun)
        crashes |= find_crashes(process_rows, crashes)
    _write_attempts(file, task, begun + 1, crashes)
    try:
        yield crashes
    except Exception:
        _write_attempts(file, task, begun, crashes)  # the process lives, so that no row has killed it
        raise


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


def find_crashes(process_rows: ProcessRows, known: Crashes) -> dict[int, str]:
    """Return the rows that kill a process, beyond those that are known. Raises RunError when reading them does."""
    crashes = dict(known)
    while True:
        position, death = _process_in_child(process_rows, crashes)
        if death is None:
            return crashes
        if position == READING:
            raise RunError(
                f"reading the rows of a shard ends its process ({death}); the annotation file may be damaged"
            )
        logger.warning("row %d of the shard ends its process (%s)", position, death)
        crashes[position] = death


def _process_in_child(process_rows: ProcessRows, crashes: Crashes) -> tuple[int, str | None]:
    """Process the rows in a child; return the last announced position and how the child died, None if it did not.

    An exception in the child is no death: the attempt itself will meet and report it.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks that other threads hold
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_announce_rows, args=(process_rows, crashes, sender), name="find-crashes")
    child.start()
    sender.close()
    position = READING
    try:
        while True:
            position = receiver.recv()
    except EOFError:
        child.join()
    status = child.exitcode or 0
    return position, signal.Signals(-status).name if status < 0 else None


def _announce_rows(process_rows: ProcessRows, crashes: Crashes, sender: Connection) -> None:
    process_rows(crashes, sender.send)
