"""Operators as a user of raylava would write them; recipes name them `tests.support.user_operators:NAME`."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import ray

from raylava.corpus.operators import DuplicateKey, deduplicates, reads_images
from raylava.corpus.rows import SourceRow


def one_row_per_exchange(row: SourceRow) -> Iterator[SourceRow]:
    """Split a conversation; each row repeats the images."""
    for start in range(0, len(row.turns), 2):
        question, answer = row.turns[start : start + 2]
        text = question.text if "<image>" in question.text else "<image>\n" * len(row.images) + question.text
        yield replace(row, turns=(replace(question, text=text), answer))


def twice(row: SourceRow) -> list[SourceRow]:
    """Return the row twice."""
    return [row, row]


@reads_images
def larger_than(row: SourceRow, images: Sequence[bytes], size: int) -> SourceRow | None:
    """Keep rows whose images are all larger than `size` bytes."""
    return row if all(len(image) > size for image in images) else None


@deduplicates
def one_per_second_word(row: SourceRow) -> DuplicateKey:
    """Keep one row per second word of its answer."""
    return DuplicateKey(row.turns[1].text.split()[1].encode())


def slow(row: SourceRow, seconds: float, folder: str) -> SourceRow:
    """Take some time, and leave a file named by the Ray node in `folder`."""
    time.sleep(seconds)
    (Path(folder) / ray.get_runtime_context().get_node_id()).touch()
    return row


@reads_images
def aborting(row: SourceRow, images: Sequence[bytes], numbers: Sequence[int]) -> SourceRow:
    """Abort the process, as a decoder does for some images, at the rows with these numbers."""
    if images[0] and int(row.sample_id.rpartition(".")[2]) in numbers:
        os.abort()
    return row


@deduplicates
def aborting_key(row: SourceRow, numbers: Sequence[int]) -> DuplicateKey:
    """Abort the process at the rows with these numbers."""
    if int(row.sample_id.rpartition(".")[2]) in numbers:
        os.abort()
    return DuplicateKey(row.sample_id.encode())


def failing(row: SourceRow) -> SourceRow:
    """Fail as a mistake in a user's function does."""
    raise ZeroDivisionError(f"a mistake at 0x7f0123456789 in {len(row.turns)}")


def wrong_type(row: SourceRow) -> bool:
    """Return what no operator may return: whether to keep the row."""
    return bool(row.turns)


def failing_generator(row: SourceRow) -> Iterator[SourceRow]:
    """Fail after the first row."""
    yield row
    raise ZeroDivisionError


@deduplicates
def failing_key(row: SourceRow) -> DuplicateKey:
    """Fail for every other row."""
    if int(row.sample_id.rpartition(".")[2]) % 2:
        raise ZeroDivisionError
    return DuplicateKey(row.sample_id.encode())


@deduplicates
def wrong_key(row: SourceRow) -> str:
    """Return a text instead of a DuplicateKey."""
    return row.sample_id
