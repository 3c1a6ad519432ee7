"""Annotation file formats: LLaVA JSON, JSON Lines, Parquet and WebDataset tars.

`scan` reads a file once, with one row in memory at a time, and yields a reference to each row; `read_rows` reads rows
by reference on any node and transfers only their bytes. rows.py interprets the raw rows.
"""

import codecs
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow.parquet as pq

from raylava.corpus.quarantine import BadRow, Reason, describe_error
from raylava.errors import UserError
from raylava.storage import READ_BYTES, StoragePath

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


@dataclass(frozen=True)
class RowRef:
    """Reference to a row of a file.

    `offset` is its JSON-serializable position, for the same format's `read_rows`; `raw` is the row itself when scanning
    parses rows, else None.
    """

    offset: Any
    raw: Any = None


@dataclass
class Part:
    """The bytes [start, stop) of a file; `digest` has seen those that a scan of the part read. Without `stop`, to the
    end of the file.
    """

    start: int = 0
    stop: int | None = None
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def update(self, position: int, content: bytes) -> None:
        """Add what was read at a position of the file to the digest; reads must be in order and leave no gap."""
        stop = len(content) if self.stop is None else max(0, self.stop - position)
        self.digest.update(content[max(0, self.start - position) : stop])


class Format(Protocol):
    """Interface of a file format."""

    exposes_rows: bool  # whether `scan` reads the rows themselves, so that they can be selected by image path
    can_split: bool  # whether a file can be scanned in parts

    def scan(self, file: StoragePath, part: Part | None = None) -> Iterator[RowRef]:
        """Yield a reference to every row of the file, or to those that begin in one part of it, in order.

        A format that exposes rows adds what it reads to the part's digest. Raises UserError for a file of another
        format.
        """

    def read_rows(self, file: StoragePath, offsets: Sequence[Any], max_image_bytes: int | None = None) -> Iterator[Any]:
        """Yield the raw rows at these offsets, in their order; for a malformed row, a string that describes it.

        For a row with an image of more than `max_image_bytes` in a separate file, a BadRow; the image is not read.
        """


class LlavaJson:
    """One JSON list of rows, of any size; it is scanned in chunks, and rows are referenced by byte range."""

    exposes_rows = True
    can_split = False

    def scan(self, file: StoragePath, part: Part | None = None) -> Iterator[RowRef]:
        """See Format."""
        rows = conversations = 0
        for row in self._rows(file, part or Part()):
            rows += 1
            conversations += isinstance(row.raw, dict) and "conversations" in row.raw
            yield row
        if not rows:
            raise UserError(f"{file}: the list is empty; LLaVA JSON is a non-empty list of rows")
        if not conversations:
            raise UserError(f"{file}: not LLaVA JSON: no row has `conversations`")

    def read_rows(self, file: StoragePath, offsets: Sequence[Any], max_image_bytes: int | None = None) -> Iterator[Any]:
        """See Format."""
        return (_parse_json(content) for content in _read_ranges(file, offsets))

    def _rows(self, file: StoragePath, part: Part) -> Iterator[RowRef]:
        cursor = _JsonCursor(file, part)
        if cursor.next_character() != "[":
            raise UserError(f"{file}: not LLaVA JSON, a non-empty list of rows: it does not begin with [")
        cursor.skip(1)
        while (character := cursor.next_character()) != "]":
            if character == ",":
                cursor.skip(1)
                continue
            yield cursor.value()
        cursor.read_rest()


class _JsonCursor:
    """A cursor over a JSON file that keeps at most the current value and one chunk in memory."""

    def __init__(self, file: StoragePath, part: Part) -> None:
        self._file, self._part, self._bytes_read = file, part, 0
        self._stream = file.filesystem.open_input_stream(file.path)
        self._decode_json = json.JSONDecoder().raw_decode
        self._utf8 = codecs.getincrementaldecoder("utf-8")()  # a chunk may end within a character
        self._text = ""
        self._position = 0  # index in _text
        self._byte_offset = 0  # of _text[_position] in the file

    def next_character(self) -> str:
        """Skip white space and return the next character without consuming it. Raises UserError at the file's end."""
        while True:
            while self._position < len(self._text):
                if not self._text[self._position].isspace():
                    return self._text[self._position]
                self.skip(1)
            if not self._read_chunk():
                raise UserError(f"{self._file}: incomplete JSON: the list is not closed (byte {self._byte_offset})")

    def skip(self, characters: int) -> None:
        """Advance by `characters` characters."""
        skipped = self._text[self._position : self._position + characters]
        self._byte_offset += len(skipped.encode())
        self._position += characters

    def value(self) -> RowRef:
        """Consume the value at the cursor and return its reference. Raises UserError for invalid JSON."""
        while True:
            try:
                raw, end = self._decode_json(self._text, self._position)
            except json.JSONDecodeError as error:
                if self._read_chunk():
                    continue
                raise UserError(f"{self._file}: not JSON at byte {self._byte_offset}: {error.msg}") from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nesting as deep
                raw, end = _unreadable(error), self._end_of_value()
            unfinished = end == len(self._text) or self._text[end] in ".eE"  # a number may continue in the next chunk
            if unfinished and self._read_chunk():
                continue
            start = self._byte_offset
            self.skip(end - self._position)
            return RowRef([start, self._byte_offset - start], raw)

    def _end_of_value(self) -> int:
        """Return the position after the value at the cursor, found by its brackets and quotes alone."""
        depth, in_string, escaped, index = 0, False, False, self._position
        while True:
            while index < len(self._text):
                character = self._text[index]
                if in_string:
                    in_string = escaped or character != '"'
                    escaped = character == "\\" and not escaped
                elif depth == 0 and index > self._position and character in ",]":
                    return index
                else:
                    in_string = character == '"'
                    depth += (character in "[{") - (character in "]}")
                    if depth == 0 and character in "]}":
                        return index + 1
                index += 1
            scanned = index - self._position
            if not self._read_chunk():
                raise UserError(f"{self._file}: incomplete JSON: the list is not closed (byte {self._byte_offset})")
            index = self._position + scanned

    def read_rest(self) -> None:
        """Read what follows the list, for the digest alone."""
        while self._next_chunk():
            pass

    def _next_chunk(self) -> bytes:
        chunk: bytes = self._stream.read(READ_BYTES)
        self._part.update(self._bytes_read, chunk)
        self._bytes_read += len(chunk)
        return chunk

    def _read_chunk(self) -> bool:
        """Append the next chunk to the text after the cursor; return False at the end of the file."""
        chunk = self._next_chunk()
        if not chunk:
            return False
        try:
            text = self._utf8.decode(chunk)
        except UnicodeDecodeError as error:
            raise UserError(f"{self._file}: not JSON: {error}; it must be UTF-8") from error
        self._text = self._text[self._position :] + text
        self._position = 0
        return True


class JsonLines:
    """One JSON row per line; empty lines are skipped. A line that is not JSON is a bad row, not a bad file."""

    exposes_rows = True
    can_split = True

    def scan(self, file: StoragePath, part: Part | None = None) -> Iterator[RowRef]:
        """See Format."""
        part = part or Part()
        offset, rows = part.start, 0
        with file.open_random() as stream, io.BufferedReader(_PartReader(stream, part), READ_BYTES) as reader:
            if part.start:
                offset += len(reader.readline()) - 1  # the line that began before the part, or the end of one
            while part.stop is None or offset < part.stop:
                line = reader.readline()
                if not line:
                    break
                if line.strip():
                    rows += 1
                    yield RowRef([offset, len(line)], _parse_json(line))
                offset += len(line)
        if not rows and part.stop is None:
            raise UserError(f"{file}: contains no rows")

    def read_rows(self, file: StoragePath, offsets: Sequence[Any], max_image_bytes: int | None = None) -> Iterator[Any]:
        """See Format."""
        return (_parse_json(content) for content in _read_ranges(file, offsets))


class _PartReader(io.RawIOBase):
    """Reads a file from the byte before a part's start, and adds what belongs to the part to its digest."""

    def __init__(self, stream: io.RawIOBase, part: Part) -> None:
        self._stream, self._part, self._position = stream, part, max(0, part.start - 1)
        stream.seek(self._position)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer)) or b""
        self._part.update(self._position, content)
        self._position += len(content)
        buffer[: len(content)] = content
        return len(content)


def _parse_json(line: bytes) -> Any:
    """Return the parsed line, or a string that describes the error."""
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return f"not JSON: {error}"
    except (ValueError, RecursionError) as error:
        return _unreadable(error)


def _unreadable(error: Exception) -> str:
    return f"JSON that cannot be read: {describe_error(error)}"


def _read_ranges(file: StoragePath, ranges: Sequence[Any]) -> Iterator[bytes]:
    """Yield the bytes of each [offset, size] range."""
    with file.open_random() as stream:
        for span in ranges:
            yield _read_span(stream, span)


class Parquet:
    """Parquet tables, including Hugging Face `datasets` exports; images may be embedded in the rows."""

    exposes_rows = False
    can_split = False

    def scan(self, file: StoragePath, part: Part | None = None) -> Iterator[RowRef]:
        """See Format."""
        try:
            metadata = pq.read_metadata(file.path, filesystem=file.filesystem)
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not Parquet ({error})") from error
        if not {"conversations", "messages"} & set(metadata.schema.to_arrow_schema().names):
            raise UserError(f"{file}: has neither a `conversations` nor a `messages` column")
        for group in range(metadata.num_row_groups):
            for row in range(metadata.row_group(group).num_rows):
                yield RowRef([group, row])

    def read_rows(self, file: StoragePath, offsets: Sequence[Any], max_image_bytes: int | None = None) -> Iterator[Any]:
        """See Format."""
        table, loaded_group = None, -1
        with pq.ParquetFile(file.path, filesystem=file.filesystem) as parquet:
            for group, row in offsets:
                if group != loaded_group:
                    table, loaded_group = parquet.read_row_group(group), group
                assert table is not None
                yield table.slice(row, 1).to_pylist()[0]


class WebDataset:
    """Tars of samples: members whose names are equal up to the first dot. `.json` is the row, or `.txt` a caption."""

    exposes_rows = False
    can_split = False

    def scan(self, file: StoragePath, part: Part | None = None) -> Iterator[RowRef]:
        """See Format."""
        key: str | None = None
        members: dict[str, Any] = {}
        try:
            with file.open_random() as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    name, suffix = _split_name(member.name)
                    if name != key and members:
                        yield RowRef({"key": key, **members})
                        members = {}
                    key = name
                    members[suffix] = [member.offset_data, member.size]
        except tarfile.TarError as error:
            raise UserError(f"{file}: not a tar, or truncated ({error})") from error
        if not members:
            raise UserError(f"{file}: contains no samples")
        yield RowRef({"key": key, **members})

    def read_rows(self, file: StoragePath, offsets: Sequence[Any], max_image_bytes: int | None = None) -> Iterator[Any]:
        """See Format."""
        with file.open_random() as stream:
            for offset in offsets:
                spans = {suffix: span for suffix, span in offset.items() if suffix != "key"}
                large = [suffix for suffix, (_, size) in spans.items() if max_image_bytes and size > max_image_bytes]
                if any(map(_is_image, large)):
                    size = max(spans[suffix][1] for suffix in large)
                    detail = f"{offset['key']}: {size} bytes, more than max_image_bytes={max_image_bytes}"
                    yield BadRow(Reason.IMAGE_TOO_LARGE, detail)
                    continue
                yield self._row(offset["key"], {suffix: _read_span(stream, span) for suffix, span in spans.items()})

    def _row(self, key: str, members: dict[str, bytes]) -> Any:
        images = [content for suffix, content in sorted(members.items()) if _is_image(suffix)]
        if "json" in members:
            raw = _parse_json(members["json"])
            if isinstance(raw, dict):
                raw = {"id": key, **raw}
                if images:
                    raw["image"] = images
            return raw
        if "txt" in members and images:
            caption = members["txt"].decode("utf-8", errors="replace")
            turns = [{"from": "human", "value": "<image>" * len(images)}, {"from": "gpt", "value": caption}]
            return {"id": key, "image": images, "conversations": turns}
        return f"{key}: has neither .json nor .txt with an image, only {', '.join(sorted(members))}"


def _split_name(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _is_image(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in _IMAGE_SUFFIXES


def _read_span(stream: Any, span: Sequence[int]) -> bytes:
    stream.seek(span[0])
    return stream.read(span[1])


FORMATS: dict[str, Format] = {
    "llava_json": LlavaJson(),
    "jsonl": JsonLines(),
    "parquet": Parquet(),
    "webdataset": WebDataset(),
}
SUFFIXES = {".json": "llava_json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".tar": "webdataset"}


def format_of(file: StoragePath) -> str:
    """Return the format that a file's suffix indicates. Raises UserError for an unknown suffix."""
    for suffix, name in SUFFIXES.items():
        if file.name.lower().endswith(suffix):
            return name
    raise UserError(f"{file}: the file name does not indicate its format; set format to one of {', '.join(FORMATS)}")
