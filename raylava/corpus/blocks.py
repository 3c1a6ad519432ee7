"""The on-disk format of a prepared corpus: Arrow IPC streams, readable by pyarrow, polars and Hugging Face `datasets`.

blocks/block-00000.arrow …   one row per sample (SCHEMA), memory-mapped when read
lengths.arrow                length, image count and loss tokens of every sample: all that batch planning reads
manifest.json                rows, bytes and SHA-256 per block; tokenizer and image settings; total counts
quarantine.csv               every row that is in no block, quarantined or filtered out, with its reason
tokenizer/                   the tokenizer that produced input_ids, as a Hugging Face folder
"""

import bisect
import csv
import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from raylava.corpus.quarantine import QuarantinedRow
from raylava.errors import RunError, UserError, first_line, redact_urls
from raylava.storage import StoragePath, storage_path

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
FETCHED = "fetched"  # folder with a file per block: URL, size and SHA-256 of each image that was fetched
TOKENIZER = "tokenizer"
CORRUPT_BLOCK = "corrupt block (SHA-256 differs from the manifest); prepare the corpus again"
_MAX_OPEN_BLOCKS = 64
_MAX_CELL = 2000  # characters of a cell of the quarantine
_CONTROL_CHARACTERS = {code: f"\\x{code:02x}" for code in range(32)}


@dataclass(frozen=True)
class Sample:
    """One row of a block: one training sample.

    `images` are encoded (JPEG, PNG or WebP) at the backbone's resolution. `input_ids` has one id per image; `length` is
    the number of tokens with every image expanded to its image tokens. `loss_spans` are [start, stop) in `input_ids`.
    """

    sample_id: str
    input_ids: list[int]
    loss_spans: list[tuple[int, int]]
    images: list[bytes]
    length: int

    @property
    def loss_tokens(self) -> int:
        """Number of tokens that the loss covers."""
        return sum(stop - start for start, stop in self.loss_spans)


@dataclass(frozen=True)
class BlockRecord:
    """One block in the manifest. `path` is relative to the artifact.

    Its source rows are `rows` + `quarantined` + `filtered` - `added`.

    `truncated` counts samples that were cut to `max_length` tokens (see `on_overlong`). `fetched` counts the images
    that were fetched by URL, `fetched_sha256` is that of the file which lists the SHA-256 of each. `filtered` counts
    the rows that operators took out, `added` those that they made beyond one of each source row.
    """

    path: str
    rows: int
    quarantined: int
    truncated: int
    bytes: int
    sha256: str
    fetched: int = 0
    fetched_sha256: str = ""
    filtered: int = 0
    added: int = 0


@dataclass(frozen=True)
class Manifest:
    """Description of a prepared corpus: its blocks in order, tokenizer, image settings, and counts of rows and tokens.

    `pixels` identifies the vision backbone's image preprocessing. `quarantine` counts the quarantined and filtered rows
    by reason. `rows_in` + `added` = `rows` + `quarantined` + `filtered`, see BlockRecord.
    """

    schema_version: int
    tokenizer: str
    pixels: dict[str, Any]
    blocks: tuple[BlockRecord, ...]
    rows_in: int
    rows: int
    tokens: int
    loss_tokens: int
    images: int
    truncated: int
    quarantined: int
    quarantine: dict[str, int]
    filtered: int = 0
    added: int = 0

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=2, sort_keys=True).encode()

    def file_hashes(self) -> dict[str, str]:
        """Return the SHA-256 of the blocks, and of the lists of fetched images, by path."""
        hashes = {block.path: block.sha256 for block in self.blocks}
        return hashes | {
            fetched_images_file(shard): block.fetched_sha256
            for shard, block in enumerate(self.blocks)
            if block.fetched_sha256
        }

    def counts(self) -> dict[str, Any]:
        """Return the total counts, without the list of blocks."""
        names = ["rows_in", "rows", "tokens", "loss_tokens", "images", "truncated", "quarantined", "quarantine"]
        names += [name for name in ("filtered", "added") if getattr(self, name)]
        return {name: getattr(self, name) for name in names} | {"bytes": sum(block.bytes for block in self.blocks)}


def fetched_images_file(shard: int) -> str:
    """Return the path, in the artifact, of the list of images that were fetched for a block."""
    return f"{FETCHED}/images-{shard:05d}.jsonl"


def read_manifest(corpus: StoragePath) -> Manifest:
    """Read the manifest of a prepared corpus. Raises UserError for one that is missing or damaged."""
    try:
        content = (corpus / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"{corpus}: not a prepared corpus (no {MANIFEST}); give a folder below STORAGE/prepare"
        ) from error
    try:
        return TypeAdapter(Manifest).validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        problem = f"{place}: {first['msg']}".removeprefix(": ")
        raise UserError(f"{corpus / MANIFEST}: damaged ({problem}); prepare the corpus again") from error


@dataclass(frozen=True)
class Lengths:
    """Expanded tokens, images and loss tokens per sample: int32 arrays of shape (samples,), in block order."""

    length: npt.NDArray[np.int32]
    images: npt.NDArray[np.int32]
    loss_tokens: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.length)


def encode_block(samples: Sequence[Sample]) -> bytes:
    """Encode samples as one Arrow IPC stream. Deterministic: equal samples give equal bytes."""
    columns = {
        "sample_id": [sample.sample_id for sample in samples],
        "input_ids": [sample.input_ids for sample in samples],
        "loss_spans": [[{"start": start, "stop": stop} for start, stop in sample.loss_spans] for sample in samples],
        "images": [sample.images for sample in samples],
        "length": [sample.length for sample in samples],
    }
    return _encode_table(pa.table(columns, schema=SCHEMA))


def encode_lengths(lengths: Lengths) -> bytes:
    """Encode lengths as one Arrow IPC stream."""
    return _encode_table(
        pa.table({field.name: getattr(lengths, field.name) for field in fields(lengths)}, LENGTHS_SCHEMA)
    )


def sample_lengths(samples: Sequence[Sample]) -> Lengths:
    """Return the lengths of samples, in their order."""
    return Lengths(
        np.array([sample.length for sample in samples], dtype=np.int32),
        np.array([len(sample.images) for sample in samples], dtype=np.int32),
        np.array([sample.loss_tokens for sample in samples], dtype=np.int32),
    )


def decode_lengths(content: bytes) -> Lengths:
    """Decode the output of `encode_lengths`."""
    table = pa.ipc.open_stream(pa.BufferReader(content)).read_all()
    return Lengths(*(table[field.name].to_numpy().copy() for field in fields(Lengths)))


def map_lengths(file: Path) -> Lengths:
    """Return the lengths in a file as read-only memory-mapped arrays, which the processes of a node share."""
    with pa.memory_map(str(file)) as mapped:
        table = pa.ipc.open_stream(mapped).read_all()
    assert table[0].num_chunks == 1, "encode_lengths writes one record batch"
    return Lengths(*(table[field.name].chunk(0).to_numpy(zero_copy_only=True) for field in fields(Lengths)))


def concatenate_lengths(lengths: Iterable[Lengths]) -> Lengths:
    """Concatenate the lengths of several blocks."""
    blocks = list(lengths)
    return Lengths(*(np.concatenate([getattr(block, field.name) for block in blocks]) for field in fields(Lengths)))


def encode_quarantine(rows: Sequence[QuarantinedRow]) -> bytes:
    """Encode quarantined rows as CSV with a header."""
    return encode_csv(rows, QuarantinedRow)


def encode_csv(rows: Sequence[Any], row_type: type) -> bytes:
    """Encode instances of a dataclass as CSV with a header and one line each, with cells that read back."""
    text = io.StringIO()
    names = [field.name for field in fields(row_type)]
    writer = csv.DictWriter(text, names, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in asdict(row).items()} for row in rows)
    return text.getvalue().encode()


def _cell(value: object) -> str:
    """Return a value as a cell that reads back, in one line, and that no spreadsheet takes for a formula."""
    text = redact_urls(str(value)[: 2 * _MAX_CELL])[:_MAX_CELL].encode(errors="backslashreplace").decode()
    text = text.translate(_CONTROL_CHARACTERS)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def decode_quarantine(content: bytes) -> list[QuarantinedRow]:
    """Decode the output of `encode_quarantine`."""
    rows = csv.DictReader(io.StringIO(content.decode(), newline=""))
    return [QuarantinedRow(**{**row, "row": int(row["row"])}) for row in rows]  # type: ignore[arg-type]


def _encode_table(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


class Blocks:
    """Random access to the samples of a prepared corpus on this node, from any number of threads.

    `fetcher` returns the verified local file of a block; it is given when blocks are remote. At most _MAX_OPEN_BLOCKS
    of those stay open, because a memory-mapped file keeps its disk space after it is evicted from the cache.
    """

    def __init__(self, folder: Path, fetcher: Callable[[BlockRecord], Path] | None = None) -> None:
        self.folder, self._fetcher = folder, fetcher
        self.manifest = read_manifest(storage_path(folder))
        try:
            self.lengths = map_lengths(folder / LENGTHS)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{folder / LENGTHS}: missing or damaged ({first_line(error)}); prepare the corpus again"
            ) from error
        self._ends = list(accumulate(block.rows for block in self.manifest.blocks))
        self._tables: dict[int, pa.Table] = {}
        self._lock = threading.Lock()  # of the open tables

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> Sample:
        """Return sample `number`, counted over all blocks. Raises IndexError, or RunError for a corrupt block."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} is out of range: the corpus has {len(self)} samples")
        block = bisect.bisect_right(self._ends, number)
        row = number - (self._ends[block] - self.manifest.blocks[block].rows)
        values = self._table(block).slice(row, 1).to_pylist()[0]
        values["loss_spans"] = [(span["start"], span["stop"]) for span in values["loss_spans"]]
        return Sample(**values)

    def fetch(self, numbers: Iterable[int]) -> None:
        """Download the blocks of these samples unless they are cached."""
        if self._fetcher is not None:
            for block in sorted({bisect.bisect_right(self._ends, number) for number in numbers}):
                self._fetcher(self.manifest.blocks[block])

    def _table(self, block: int) -> pa.Table:
        """Return a block as a memory-mapped table, which stays open."""
        with self._lock:
            if block not in self._tables:
                self._tables[block] = self._open(self.manifest.blocks[block])
            return self._tables[block]

    def _open(self, record: BlockRecord) -> pa.Table:
        if self._fetcher is None:
            return self._read_local(record)
        while len(self._tables) >= _MAX_OPEN_BLOCKS:
            del self._tables[next(iter(self._tables))]
        return pa.ipc.open_stream(pa.memory_map(str(self._fetcher(record)))).read_all()

    def _read_local(self, record: BlockRecord) -> pa.Table:
        file = self.folder / record.path
        mapped = pa.memory_map(str(file))
        if hashlib.sha256(mapped.read_buffer()).hexdigest() != record.sha256:
            raise RunError(f"{file}: {CORRUPT_BLOCK}")
        mapped.seek(0)
        return pa.ipc.open_stream(mapped).read_all()
