"""The shards of a corpus that is being prepared: files of references to the selected rows, and what was made of them.

All of it lies in one folder of the artifact, which is deleted once the manifest is written. Shards are cut by row count
alone, so the same corpus gives the same shards at any parallelism.
"""

import functools
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import Any, TypeVar

from raylava.config.recipe import Corpus
from raylava.corpus.row_index import RowIndexes
from raylava.corpus.sources import SelectedRow, SourceFiles
from raylava.errors import UserError
from raylava.models.registry import LanguageSpec, VisionSpec
from raylava.storage import StoragePath, storage_path

SHARDS = "rows"  # the folder
_INDEX = "index.json"
_KEYS_PER_PARTITION = 4_000_000  # about 100 MB of keys in a task
_THREADS = 16  # on the driver, that read and write small files

T = TypeVar("T")


@dataclass(frozen=True)
class PrepareSpec:
    """All inputs of preparing one corpus; small, and identical on every node.

    `name` is the corpus's name in the recipe; `source_paths` has absolute paths or URIs, of annotations and images, per
    source; `output` is the path or URI of the artifact.
    """

    name: str
    corpus: Corpus
    source_paths: tuple[tuple[str, str], ...]
    language: LanguageSpec
    vision: VisionSpec
    output: str

    @property
    def sources(self) -> list[SourceFiles]:
        """The sources of the corpus with their files."""
        return [
            SourceFiles(source, *paths) for source, paths in zip(self.corpus.sources, self.source_paths, strict=True)
        ]


def stage_rows(spec: PrepareSpec, output: StoragePath, indexes: RowIndexes | None = None) -> tuple[int, int]:
    """Split the selected rows into shards of `samples_per_block` rows and return (rows, shards).

    A shard holds references to rows, not the rows: this reads the index of each annotation file and copies nothing.
    The indexes are built here without `indexes`. When the shards are already staged, it only returns their counts.
    Raises UserError when no row is selected.
    """
    index = output / SHARDS / _INDEX
    if index.exists():
        counts = json.loads(index.read_bytes())
        return counts["rows"], counts["shards"]
    rows = shards = 0
    with ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="write-shard") as pool:
        writes: deque[Future[None]] = deque()
        for shard, lines in enumerate(_shard_lines(spec, indexes or RowIndexes())):
            writes.append(pool.submit(shard_file(output, "shard", shard, "jsonl").write_bytes, b"\n".join(lines)))
            rows += len(lines)
            shards += 1
            if len(writes) > 2 * _THREADS:  # bounds the memory
                writes.popleft().result()
        for write in writes:
            write.result()
    if not rows:
        raise UserError(f"corpora.{spec.name}: no row is selected; relax include, exclude or max_rows of its sources")
    index.write_bytes(json.dumps({"rows": rows, "shards": shards}).encode())
    return rows, shards


def _shard_lines(spec: PrepareSpec, indexes: RowIndexes) -> Iterator[list[bytes]]:
    """Yield the lines of each shard's file, one selected row per line."""
    lines: list[bytes] = []
    for number, source in enumerate(spec.sources):
        for row in source.selected_rows(number, indexes):
            lines.append(json.dumps(astuple(row)).encode())
            if len(lines) == spec.corpus.samples_per_block:
                yield lines
                lines = []
    if lines:
        yield lines


@dataclass(frozen=True)
class RawRow:
    """A selected row with its content and its position in its shard. Image paths are relative to `image_root`."""

    position: int
    selected: SelectedRow
    file: StoragePath
    image_root: StoragePath
    content: Any


def read_shard(spec: PrepareSpec, shard: int) -> Iterator[RawRow]:
    """Yield the rows of a shard; rows of one file are read together."""
    lines = shard_file(storage_path(spec.output), "shard", shard, "jsonl").read_bytes().splitlines()
    rows = [SelectedRow(*json.loads(line)) for line in lines]
    sources, positions = spec.sources, itertools.count()
    for (source_number, file_number), group in itertools.groupby(rows, key=lambda row: (row.source, row.file)):
        source, rows_of_file = sources[source_number], list(group)
        file, image_root = source.files[file_number], storage_path(source.images)
        contents = source.format(file).read_rows(
            file, [row.offset for row in rows_of_file], spec.corpus.max_image_bytes
        )
        for row, content in zip(rows_of_file, contents, strict=True):
            yield RawRow(next(positions), row, file, image_root, content)


def shard_file(output: StoragePath, kind: str, shard: int, suffix: str) -> StoragePath:
    """Return the file of a kind (shard, record, …) that belongs to a shard."""
    return output / SHARDS / f"{kind}-{shard:05d}.{suffix}"


def existing_shards(output: StoragePath, kind: str, suffix: str, shards: int) -> list[int]:
    """Return the shards of which a file of this kind exists, by one listing."""
    names = {file.name for file in (output / SHARDS).children()}
    return [shard for shard in range(shards) if shard_file(output, kind, shard, suffix).name in names]


def in_parallel(read: Callable[[int], T], shards: Sequence[int]) -> Iterator[T]:
    """Yield `read(shard)` in order; a store in the network answers many requests at the same time."""
    with ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="read-shard") as pool:
        reads: deque[Future[T]] = deque()
        for shard in shards:
            reads.append(pool.submit(read, shard))
            if len(reads) > 2 * _THREADS:  # bounds the memory
                yield reads.popleft().result()
        while reads:
            yield reads.popleft().result()


def key_partitions(output: StoragePath) -> int:
    """Return the number of partitions in which duplicates are searched; the rows must have been staged."""
    return _key_partitions((output / SHARDS / _INDEX).uri)


@functools.lru_cache(maxsize=16)
def _key_partitions(index: str) -> int:
    rows: int = json.loads(storage_path(index).read_bytes())["rows"]
    return -(-rows // _KEYS_PER_PARTITION)
