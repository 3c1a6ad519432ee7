"""Selects the rows of a recipe's sources by the indexes of their files.

Reads no image files. A file that cannot be read, or of an unknown format, raises UserError.
"""

import hashlib
import itertools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow.fs as pafs

from raylava.config.recipe import Source
from raylava.corpus.fetch import is_url
from raylava.corpus.formats import COMPRESSED_SUFFIXES, FORMATS, SUFFIXES, format_of
from raylava.corpus.row_format import Format
from raylava.corpus.row_index import AnnotationFile, RowIndexes
from raylava.corpus.rows import matches_filters
from raylava.errors import UserError
from raylava.storage import StoragePath, storage_path

_PARQUET_END = b"PAR1"
_TAIL_BYTES = 64 << 10  # the end of a file: a Parquet footer, the last samples of a tar


@dataclass(frozen=True)
class SelectedRow:
    """One row selected for a corpus.

    `source`, `file` and `row` are numbers that start at 0; `copy` numbers the repetitions of a row; `offset` is the
    position of the row in its file, for the format's `read_rows`.
    """

    source: int
    file: int
    row: int
    copy: int
    offset: Any

    @property
    def id_suffix(self) -> str:
        """The suffix that makes a row's id unique in the corpus (LLaVA's published files repeat ids)."""
        return f"#{self.source}.{self.file}.{self.row}" + (f"+{self.copy}" if self.copy else "")


class SourceFiles:
    """A source and its files. `annotations` and `images` are absolute paths or URIs."""

    def __init__(self, source: Source, annotations: str, images: str) -> None:
        self.source, self.annotations, self.images = source, annotations, images

    @cached_property
    def files(self) -> list[StoragePath]:
        """The annotation file, or the files of known formats in a folder, by name. Raises UserError for none."""
        root = storage_path(self.annotations)
        kind = root.info().type
        if kind == pafs.FileType.NotFound:
            raise UserError(f"{root}: no such file; set the source's annotations (or data=…)")
        if kind != pafs.FileType.Directory:
            return [root]
        children = root.children()
        files = [file for file in children if file.name.lower().endswith(tuple(SUFFIXES))]
        compressed = [file for file in children if file.name.lower().endswith(COMPRESSED_SUFFIXES)]
        if compressed:
            raise UserError(f"{compressed[0]}: compressed, so that its rows cannot be read; decompress it")
        if not files:
            raise UserError(f"{root}: contains no file of a known format ({', '.join(SUFFIXES)})")
        return files

    @property
    def has_filters(self) -> bool:
        """Whether the source selects rows by image path."""
        return self.source.include != ("*",) or bool(self.source.exclude)

    def format_name(self, file: StoragePath) -> str:
        """Return the name of the format of a file of this source."""
        return format_of(file) if self.source.format == "auto" else self.source.format

    def format(self, file: StoragePath) -> Format:
        """Return the format of a file of this source."""
        return FORMATS[self.format_name(file)]

    @property
    def annotation_files(self) -> list[AnnotationFile]:
        """The files with their formats. Raises UserError like `files`."""
        return [AnnotationFile(file.uri, self.format_name(file)) for file in self.files]

    def selected_rows(self, number: int, indexes: RowIndexes) -> Iterator[SelectedRow]:
        """Yield the rows that source number `number` contributes to its corpus, in order and with repetitions.

        Raises UserError like `matching_rows`.
        """
        for file_number, row, offset in itertools.islice(self.matching_rows(indexes), self.source.max_rows):
            for copy in range(_copies(self.source.sampling_weight, f"{number}.{file_number}.{row}")):
                yield SelectedRow(number, file_number, row, copy, json.loads(offset))

    def matching_rows(self, indexes: RowIndexes) -> Iterator[tuple[int, int, str]]:
        """Yield (file number, row number, offset as JSON) of the rows that match `include` and `exclude`.

        Raises UserError for unreadable files, and for filters on a format that does not expose its rows.
        """
        for number, file in enumerate(self.files):
            for row, offset, _ in self._matching_rows(file, indexes):
                yield number, row, offset

    def _matching_rows(self, file: StoragePath, indexes: RowIndexes) -> Iterator[tuple[int, str, list[str]]]:
        """Yield (row number, offset as JSON, image paths)."""
        source = self.source
        if self.has_filters and not self.format(file).exposes_rows:
            raise UserError(
                f"{file}: include and exclude select rows by image path, which works for JSON formats only; "
                "remove them or convert the file to JSON Lines"
            )
        for row, (offset, names) in enumerate(indexes.get(file, self.format_name(file)).rows()):
            if not self.has_filters or matches_filters(names, source.include, source.exclude):
                yield row, offset, names

    def image_names(self, file: StoragePath, indexes: RowIndexes) -> Iterator[str]:
        """Yield the image paths, not the URLs, of a file's matching rows, of formats that expose them.

        Raises like `matching_rows`.
        """
        if self.format(file).exposes_rows:
            for *_, names in self._matching_rows(file, indexes):
                yield from (name for name in names if not is_url(name))

    def content_hash(self, file: StoragePath, indexes: RowIndexes) -> Any:
        """Return the hash of a JSON file; of other formats the size, and the SHA-256 of the last 64 KiB."""
        if self.format(file).exposes_rows:
            return indexes.get(file, self.format_name(file)).content
        return _tail_fingerprint(file)


def file_sizes(root: StoragePath, names: set[str]) -> dict[str, int]:
    """Return the size in bytes of each named file below `root`; missing files are left out."""
    return {name: size for name, size in root.walk_files() if name in names} if names else {}


def _tail_fingerprint(file: StoragePath) -> dict[str, Any]:
    size = file.info().size
    if not size:
        raise UserError(f"{file}: is empty; copy the file again")
    if file.name.lower().endswith(".tar") and size % tarfile.BLOCKSIZE:
        raise UserError(f"{file}: not a tar, or cut off: its size is no multiple of {tarfile.BLOCKSIZE} bytes")
    with file.filesystem.open_input_file(file.path) as stream:
        stream.seek(max(0, size - _TAIL_BYTES))
        tail = stream.read()
    if file.name.lower().endswith(".parquet") and not tail.endswith(_PARQUET_END):
        raise UserError(f"{file}: not Parquet, or cut off; copy the file again")
    return {"bytes": size, "tail": hashlib.sha256(tail).hexdigest()}


def _copies(weight: float, row_key: str) -> int:
    """Return the copies of a row: floor(weight), plus one with probability frac(weight), seeded by the row number."""
    if weight == 1:
        return 1
    draw = int.from_bytes(hashlib.sha256(row_key.encode()).digest()[:8], "big") / 2**64
    return int(weight) + (draw < weight - int(weight))
