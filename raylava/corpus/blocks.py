"""The block format: Arrow IPC streams that pyarrow, polars and Hugging Face `datasets` open, and a manifest over them.

    blocks/block-00000.arrow …   one row a sample (SCHEMA), memory-mapped
    lengths.arrow                length, images and supervised tokens of every row: all that planning an epoch reads
    manifest.json                each block's rows, bytes and SHA-256; identities; counts; the quarantine's by reason
    quarantine.csv               every source row that is in no block, with its reason
    tokenizer/                   what input_ids were made with, as a Hugging Face folder

How rows come to be is prepare.py's business.
"""

import bisect
import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raylava.corpus.quarantine import Quarantined
from raylava.errors import RunError
from raylava.storage import StoragePath

SCHEMA_VERSION = 1
SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_spans", pa.list_(pa.struct([("start", pa.int32()), ("stop", pa.int32())])), nullable=False),
        pa.field("images", pa.list_(pa.binary()), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
    ]
)
LENGTHS_SCHEMA = pa.schema([(name, pa.int32()) for name in ("length", "images", "loss_tokens")])
MANIFEST = "manifest.json"
LENGTHS = "lengths.arrow"
QUARANTINE = "quarantine.csv"
TOKENIZER = "tokenizer"
_OPEN_AT_ONCE = 64


@dataclass(frozen=True)
class Sample:
    """One row of a block. `images` are encoded at the backbone's resolution; `length` counts expanded tokens."""

    sample_id: str
    input_ids: list[int]
    loss_spans: list[tuple[int, int]]
    images: list[bytes]
    length: int

    @property
    def loss_tokens(self) -> int:
        return sum(stop - start for start, stop in self.loss_spans)


@dataclass(frozen=True)
class BlockRecord:
    """One block in the manifest; `path` is relative to the artifact. Rows in = rows + quarantined.

    `trimmed` counts rows that lost trailing turns to `max_length` (`on_overlong: trim`).
    """

    path: str
    rows: int
    quarantined: int
    trimmed: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a prepared corpus is: its blocks in order, what they were made for, and where every source row went."""

    schema_version: int
    tokenizer: str
    pixels: dict[str, Any]
    blocks: tuple[BlockRecord, ...]
    rows_in: int
    rows: int
    tokens: int
    loss_tokens: int
    images: int
    trimmed: int
    quarantined: int
    quarantine: dict[str, int]

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=2, sort_keys=True).encode()

    def figures(self) -> dict[str, Any]:
        """The counts, without the list of blocks."""
        names = ("rows_in", "rows", "tokens", "loss_tokens", "images", "trimmed", "quarantined", "quarantine")
        return {name: getattr(self, name) for name in names} | {"bytes": sum(block.bytes for block in self.blocks)}

    @classmethod
    def from_json(cls, content: bytes) -> "Manifest":
        data = json.loads(content)
        data["blocks"] = tuple(BlockRecord(**block) for block in data["blocks"])
        return cls(**data)


@dataclass(frozen=True)
class Lengths:
    """Per sample, int32 arrays in block order: expanded tokens, images, supervised tokens."""

    length: npt.NDArray[np.int32]
    images: npt.NDArray[np.int32]
    loss_tokens: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.length)


def block_bytes(samples: Sequence[Sample]) -> bytes:
    """The samples as one Arrow IPC stream, the same bytes each time."""
    columns = {
        "sample_id": [sample.sample_id for sample in samples],
        "input_ids": [sample.input_ids for sample in samples],
        "loss_spans": [[{"start": a, "stop": b} for a, b in sample.loss_spans] for sample in samples],
        "images": [sample.images for sample in samples],
        "length": [sample.length for sample in samples],
    }
    return _ipc(pa.table(columns, schema=SCHEMA))


def lengths_bytes(lengths: Lengths) -> bytes:
    """The lengths of all samples as one Arrow IPC stream."""
    return _ipc(pa.table({field.name: getattr(lengths, field.name) for field in fields(lengths)}, LENGTHS_SCHEMA))


def lengths_of(samples: Sequence[Sample]) -> Lengths:
    """The lengths of samples in order."""
    return Lengths(
        np.array([sample.length for sample in samples], dtype=np.int32),
        np.array([len(sample.images) for sample in samples], dtype=np.int32),
        np.array([sample.loss_tokens for sample in samples], dtype=np.int32),
    )


def read_lengths(content: bytes) -> Lengths:
    """What `lengths_bytes` wrote."""
    table = pa.ipc.open_stream(pa.BufferReader(content)).read_all()
    return Lengths(*(table[field.name].to_numpy().copy() for field in fields(Lengths)))


def concatenated(parts: Iterable[Lengths]) -> Lengths:
    """Several lengths, one after the other."""
    parts = list(parts)
    return Lengths(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Lengths)))


def quarantine_bytes(rows: Sequence[Quarantined]) -> bytes:
    """The quarantine as CSV, with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Quarantined)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue().encode()


def read_quarantine(content: bytes) -> list[Quarantined]:
    """What `quarantine_bytes` wrote."""
    rows = csv.DictReader(io.StringIO(content.decode(), newline=""))
    return [Quarantined(**{**row, "row": int(row["row"])}) for row in rows]  # type: ignore[arg-type]


def count_reasons(rows: Iterable[Quarantined]) -> dict[str, int]:
    """Rows by reason, the most frequent first."""
    return dict(Counter(row.reason for row in rows).most_common())


def _ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


class Blocks:
    """A prepared corpus on this node, read by sample number without a scan. For one thread, but for `fetch`.

    `fetcher` gives a block's verified file where blocks are not in `folder` yet; few of those stay open, since what is
    mapped keeps its disk space.
    """

    def __init__(self, folder: Path, fetcher: Callable[[BlockRecord], Path] | None = None) -> None:
        self.folder, self._fetcher = folder, fetcher
        self.manifest = Manifest.from_json((folder / MANIFEST).read_bytes())
        self.lengths = read_lengths((folder / LENGTHS).read_bytes())
        self._ends = list(accumulate(block.rows for block in self.manifest.blocks))
        self._open: dict[int, pa.Table] = {}

    @classmethod
    def at(cls, place: StoragePath) -> "Blocks":
        """The corpus at a place, copied to this node first when it is remote."""
        return cls(place.local_copy())

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> Sample:
        """Sample `number`, counted over all blocks. Raises IndexError, or RunError for a block that is damaged."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        block = bisect.bisect_right(self._ends, number)
        row = number - (self._ends[block] - self.manifest.blocks[block].rows)
        values = self._table(block).slice(row, 1).to_pylist()[0]
        values["loss_spans"] = [(span["start"], span["stop"]) for span in values["loss_spans"]]
        return Sample(**values)

    def fetch(self, numbers: Iterable[int]) -> None:
        """Bring the blocks of these samples to this node, if they are not here. Any thread may call it."""
        if self._fetcher is not None:
            for block in sorted({bisect.bisect_right(self._ends, number) for number in numbers}):
                self._fetcher(self.manifest.blocks[block])

    def _table(self, block: int) -> pa.Table:
        if block not in self._open:
            record = self.manifest.blocks[block]
            if self._fetcher is not None:
                while len(self._open) >= _OPEN_AT_ONCE:
                    del self._open[next(iter(self._open))]
                self._open[block] = pa.ipc.open_stream(pa.memory_map(str(self._fetcher(record)))).read_all()
                return self._open[block]
            mapped = pa.memory_map(str(self.folder / record.path))
            if hashlib.sha256(mapped.read_buffer()).hexdigest() != record.sha256:
                raise RunError(
                    f"{self.folder / record.path}: damaged (its SHA-256 is not the manifest's); prepare again"
                )
            mapped.seek(0)
            self._open[block] = pa.ipc.open_stream(mapped).read_all()
        return self._open[block]
