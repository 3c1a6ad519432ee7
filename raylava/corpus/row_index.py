"""The index of an annotation file: where each row is, its image paths, and what identifies the file's content.

Building one reads the file once; large files are read by Ray Data tasks on the cluster, JSON Lines in parts. An index
is kept in storage under the file's identity (location, size and modification time; of a local file also inode and
change time), so that no later command, variant, trial or retry reads the file again:

    sources/ID.json           the number of parts and their hashes; written last
    sources/ID-00000.arrow …  the rows of each part (zstd)
"""

import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from raylava.corpus.formats import FORMATS
from raylava.corpus.row_format import Part
from raylava.corpus.rows import image_names
from raylava.errors import UserError, first_line
from raylava.storage import StoragePath, storage_path

if TYPE_CHECKING:
    from raylava.corpus.parallel import Function, MapOnCluster  # would import Ray

logger = logging.getLogger(__name__)

PART_BYTES = 64 << 20
_VERSION = 3  # of the files in storage
_RECENT_SECONDS = 2.0  # a file that was just modified may be modified again without a new modification time
_SCHEMA = pa.schema([("offset", pa.string()), ("images", pa.string())])  # both as JSON
_ROWS_PER_BATCH = 65536
_THREADS = 16  # that wait for storage


@dataclass(frozen=True)
class AnnotationFile:
    """The URI of a file of annotations and the name of its format."""

    uri: str
    format: str


@dataclass(frozen=True)
class RowIndex:
    """The index of one file. `content` is its hash, None for formats that do not expose their rows."""

    content: str | None
    parts: Sequence[Callable[[], pa.Table]]

    def rows(self) -> Iterator[tuple[str, list[str]]]:
        """Yield (offset as JSON, image paths) of each row in order; offsets are those of the format's `read_rows`."""
        for read_part in self.parts:
            for batch in read_part().to_batches(_ROWS_PER_BATCH):
                for offset, images in zip(batch[0].to_pylist(), batch[1].to_pylist(), strict=True):
                    yield offset, json.loads(images) if images else []


class RowIndexes:
    """Builds each index once. `folder` keeps them; without one, or if it cannot be written, they stay in memory."""

    def __init__(self, folder: StoragePath | None = None) -> None:
        self._folder = folder
        self._indexes: dict[AnnotationFile, RowIndex] = {}
        self._versions: dict[AnnotationFile, _FileVersion] = {}

    def get(self, file: StoragePath, format_name: str) -> RowIndex:
        """Return the index of a file, built in this process unless it exists. Raises UserError like `build`."""
        annotations = AnnotationFile(file.uri, format_name)
        self.build([annotations])
        return self._indexes[annotations]

    def missing(self, files: Sequence[AnnotationFile]) -> dict[AnnotationFile, int]:
        """Return the files whose index has to be built, with their sizes in bytes."""
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="find-index") as pool:
            is_known = list(pool.map(self._find, files))
        return {file: self._versions[file].size for file, known in zip(files, is_known, strict=True) if not known}

    def build(self, files: Sequence[AnnotationFile], run: "MapOnCluster | None" = None) -> None:
        """Build the missing indexes with `run`, or in this process without it.

        Raises UserError for a file that cannot be read or has another format.
        """
        missing = self.missing(files)
        parts = [part for file in missing for part in _parts(file, self._versions[file])]
        results: dict[int, dict[str, Any]] = {}
        folder = self._folder.uri if self._folder else None
        for result in (run or _map_here)(functools.partial(_index_part, parts, folder), range(len(parts))):
            if result["user_error"]:
                raise UserError(result["user_error"])
            results[int(result["part"])] = result
        by_file: dict[AnnotationFile, list[dict[str, Any]]] = {}
        for number, part in enumerate(parts):
            by_file.setdefault(part.file, []).append(results[number])
        for file, file_results in by_file.items():
            self._complete(file, file_results)

    def _find(self, file: AnnotationFile) -> bool:
        """Return whether the index of a file is known, or found in storage."""
        if file in self._indexes:
            return True
        if file not in self._versions:
            self._versions[file] = _file_version(file)
        identity = self._versions[file].identity
        if self._folder is None or identity is None:
            return False
        try:
            record = json.loads((self._folder / f"{identity}.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return False
        self._indexes[file] = self._stored(identity, record)
        return True

    def _complete(self, file: AnnotationFile, results: Sequence[Mapping[str, Any]]) -> None:
        """Record the index of a file whose parts have been scanned."""
        if not sum(int(result["rows"]) for result in results):
            raise UserError(f"{file.uri}: contains no rows")
        content = _content_hash(results) if FORMATS[file.format].exposes_rows else None
        record = {"content": content, "parts": len(results)}
        identity = self._versions[file].identity
        tables = [result["table"] for result in results]
        if identity is None or self._folder is None or any(tables):
            self._indexes[file] = RowIndex(content, [functools.partial(_decode, table) for table in tables])
            return
        if _file_version(file).identity != identity:
            raise UserError(f"{file.uri}: was modified while it was read; run the command again once it is complete")
        self._indexes[file] = self._stored(identity, record)
        _write(self._folder / f"{identity}.json", json.dumps(record).encode())

    def _stored(self, identity: str, record: Mapping[str, Any]) -> RowIndex:
        assert self._folder is not None
        files = [_part_file(self._folder, identity, part).uri for part in range(record["parts"])]
        return RowIndex(record["content"], [functools.partial(_read_part, file) for file in files])


@dataclass(frozen=True)
class _FileVersion:
    """What changes when a file changes; no `identity` without a modification time, or if that is too recent."""

    size: int
    identity: str | None


def _file_version(file: AnnotationFile) -> _FileVersion:
    path = storage_path(file.uri)
    info = path.info()
    size = info.size or 0
    if info.mtime_ns is None or time.time() - info.mtime_ns / 1e9 < _RECENT_SECONDS:
        return _FileVersion(size, None)
    local: list[int] = []
    if path.is_local:  # these change even if the modification time is set back
        status = os.stat(path.path)
        local = [status.st_ino, status.st_ctime_ns]
    identity = json.dumps([_VERSION, file.uri, size, info.mtime_ns, local, file.format])
    return _FileVersion(size, hashlib.sha256(identity.encode()).hexdigest()[:32])


@dataclass(frozen=True)
class _FilePart:
    """A part of a file that one task scans. Without an `identity` its index cannot be kept in storage."""

    file: AnnotationFile
    number: int
    start: int
    stop: int | None
    identity: str | None


def _parts(file: AnnotationFile, version: _FileVersion) -> list[_FilePart]:
    size = version.size
    if not FORMATS[file.format].can_split or size <= PART_BYTES:
        return [_FilePart(file, 0, 0, None, version.identity)]
    return [
        _FilePart(file, number, start, min(size, start + PART_BYTES), version.identity)
        for number, start in enumerate(range(0, size, PART_BYTES))
    ]


def _content_hash(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the hash of a file from those of its parts."""
    digests = [str(result["digest"]) for result in results]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _index_part(parts: Sequence[_FilePart], folder: str | None, number: int) -> dict[str, Any]:
    """Scan one part, and write its index to the folder or, if that is not possible, return it as `table`."""
    part = parts[number]
    span = Part(part.start, part.stop)
    try:
        encoded, rows = _scan(part, span)
    except UserError as error:
        return {"part": number, "user_error": str(error), "rows": 0, "digest": "", "table": b""}
    if folder is not None and part.identity is not None:
        file = _part_file(storage_path(folder), part.identity, part.number)
        encoded = b"" if _write(file, encoded) else encoded
    return {"part": number, "user_error": "", "rows": rows, "digest": span.digest.hexdigest(), "table": encoded}


def _scan(part: _FilePart, span: Part) -> tuple[bytes, int]:
    """Return the index of a part as an Arrow IPC stream, and its number of rows."""
    file, row_count = storage_path(part.file.uri), 0
    sink = pa.BufferOutputStream()
    offsets: list[str] = []
    images: list[str] = []
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, _SCHEMA, options=options) as writer:

        def flush() -> None:
            writer.write_batch(
                pa.record_batch([pa.array(offsets, pa.string()), pa.array(images, pa.string())], _SCHEMA)
            )
            offsets.clear()
            images.clear()

        try:
            for row in FORMATS[part.file.format].scan(file, span):
                names = image_names(row.raw)
                offsets.append(json.dumps(row.offset))
                images.append(json.dumps(names) if names else "")
                row_count += 1
                if len(offsets) == _ROWS_PER_BATCH:
                    flush()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error})") from error
        flush()
    return sink.getvalue().to_pybytes(), row_count


def _write(file: StoragePath, content: bytes) -> bool:
    """Write a file of an index; return False where commands that only read, such as `status`, may not write."""
    try:
        file.write_bytes(content)
    except OSError as error:
        logger.warning("the index of a source could not be kept in %s: %s", file, first_line(error))
        return False
    return True


def _part_file(folder: StoragePath, identity: str, part: int) -> StoragePath:
    return folder / f"{identity}-{part:05d}.arrow"


def _map_here(function: "Function", items: Sequence[int]) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="index-file") as pool:
        yield from (dict(result) for result in pool.map(function, items))


@functools.lru_cache(maxsize=16)
def _read_part(uri: str) -> pa.Table:
    return _decode(storage_path(uri).read_bytes())


def _decode(content: bytes) -> pa.Table:
    return pa.ipc.open_stream(pa.BufferReader(content)).read_all()
