"""Answers as they come, in Parquet, so that an evaluation that was killed goes on where it was."""

import time
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from raylava.evaluate.questions import Answer
from raylava.storage import StoragePath

_FOLDER = "answers"
_EVERY_SECONDS = 10.0
_SCHEMA = pa.schema(
    [("question_id", pa.string()), ("prompt", pa.string()), ("text", pa.string()), ("problem", pa.string())]
)


class PredictionStore:
    """The answers of one evaluation in `output`: those of earlier attempts, and those to come."""

    def __init__(self, output: StoragePath) -> None:
        self._folder = output / _FOLDER
        self._files = [file for file in self._folder.children() if file.name.endswith(".parquet")]
        self.known = [answer for file in self._files for answer in _read(file)]
        self._new: list[Answer] = []
        self._written = time.monotonic()

    def add(self, answers: Sequence[Answer]) -> None:
        """Keep more of them: within ten seconds they are in storage."""
        self._new += answers
        if time.monotonic() - self._written >= _EVERY_SECONDS:
            self.flush()

    def flush(self) -> None:
        """All are in storage when this returns."""
        if self._new:
            file = self._folder / f"{len(self._files):06d}.parquet"
            file.write_bytes(_bytes(self._new))
            self._files.append(file)
            self._new = []
        self._written = time.monotonic()


def _read(file: StoragePath) -> list[Answer]:
    return [Answer(**row) for row in pq.read_table(pa.BufferReader(file.read_bytes())).to_pylist()]


def _bytes(answers: Sequence[Answer]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([vars(answer) for answer in answers], schema=_SCHEMA), sink)
    return sink.getvalue().to_pybytes()
