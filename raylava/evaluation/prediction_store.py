"""Storage of generated answers in Parquet, so that an interrupted evaluation resumes with the unanswered questions."""

import time
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from raylava.evaluation.questions import GeneratedAnswer
from raylava.storage import StoragePath

_FOLDER = "answers"
_FLUSH_INTERVAL_S = 10.0
_SCHEMA = pa.schema(
    [("question_id", pa.string()), ("prompt", pa.string()), ("text", pa.string()), ("problem", pa.string())]
)


class PredictionStore:
    """The answers of one evaluation, stored below its artifact folder.

    `predictions` holds the answers that earlier attempts wrote; new ones are added with `add`.
    """

    def __init__(self, output: StoragePath) -> None:
        self._folder = output / _FOLDER
        self._files = [file for file in self._folder.children() if file.name.endswith(".parquet")]
        self.predictions = [answer for file in self._files for answer in _read_answers(file)]
        self._pending: list[GeneratedAnswer] = []
        self._last_flush = time.monotonic()

    def add(self, answers: Sequence[GeneratedAnswer]) -> None:
        """Buffer answers, and flush them if the last flush was at least ten seconds ago."""
        self._pending += answers
        if time.monotonic() - self._last_flush >= _FLUSH_INTERVAL_S:
            self.flush()

    def flush(self) -> None:
        """Write all buffered answers to storage."""
        if self._pending:
            file = self._folder / f"{len(self._files):06d}.parquet"
            file.write_bytes(_to_parquet(self._pending))
            self._files.append(file)
            self._pending = []
        self._last_flush = time.monotonic()


def _read_answers(file: StoragePath) -> list[GeneratedAnswer]:
    return [GeneratedAnswer(**row) for row in pq.read_table(pa.BufferReader(file.read_bytes())).to_pylist()]


def _to_parquet(answers: Sequence[GeneratedAnswer]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([vars(answer) for answer in answers], schema=_SCHEMA), sink)
    return sink.getvalue().to_pybytes()
