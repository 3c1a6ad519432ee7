"""Where rows lie in the files people have: LLaVA JSON, JSON Lines, Parquet, WebDataset tars.

`locate` walks a file once and says where each row lies, holding one row at a time; `read` fetches rows by those words,
on any node, reading only their bytes. What a raw row means is sources.py's business.
"""

import codecs
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow.parquet as pq

from raylava.errors import UserError
from raylava.storage import StoragePath

_CHUNK = 4 << 20  # bytes read at a time when a file is walked
_GAP = 64 << 10  # rows closer than this, in bytes, are read in one go
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


@dataclass(frozen=True)
class RowRef:
    """Where a row lies (JSON-able, for the same format's `read`), and the row itself where walking had to parse it."""

    where: Any
    raw: Any = None


class Format(Protocol):
    """One kind of file."""

    parses: bool  # whether `locate` gives the rows themselves, so that they can be chosen by image path

    def locate(self, file: StoragePath) -> Iterator[RowRef]:
        """Every row of the file, in order. Raises UserError when the file is not of this format."""

    def read(self, file: StoragePath, wheres: Sequence[Any]) -> Iterator[Any]:
        """The raw rows at these places, in their order; a row that can't be parsed comes as the string it is."""


class LlavaJson:
    """One JSON list of rows, of any size: walked in chunks, its rows found by their byte ranges."""

    parses = True

    def locate(self, file: StoragePath) -> Iterator[RowRef]:
        """See Format."""
        rows = conversations = 0
        for located in self._rows(file):
            rows += 1
            conversations += isinstance(located.raw, dict) and "conversations" in located.raw
            yield located
        if not rows:
            raise UserError(f"{file}: LLaVA JSON is a non-empty list of rows, this one is empty")
        if not conversations:
            raise UserError(f"{file}: not LLaVA JSON: no row has `conversations`")

    def read(self, file: StoragePath, wheres: Sequence[Any]) -> Iterator[Any]:
        """See Format."""
        return (json.loads(content) for content in _read_ranges(file, wheres))

    def _rows(self, file: StoragePath) -> Iterator[RowRef]:
        walk = _Walk(file)
        if walk.next_character() != "[":
            raise UserError(f"{file}: LLaVA JSON is a non-empty list of rows; this does not begin with [")
        walk.skip(1)
        while (following := walk.next_character()) != "]":
            if following == ",":
                walk.skip(1)
                continue
            yield walk.value()


class _Walk:
    """A cursor over a JSON text that holds no more than the value under it and a chunk. Offsets are in bytes."""

    def __init__(self, file: StoragePath) -> None:
        self._file = file
        self._stream = file.filesystem.open_input_stream(file.path)
        self._decode = json.JSONDecoder().raw_decode
        self._characters = codecs.getincrementaldecoder("utf-8")()  # a chunk's end may cut a character
        self._text = ""
        self._place = 0  # in _text
        self._offset = 0  # in bytes, of _text[_place]

    def next_character(self) -> str:
        """The next character that is no white space, unread. Raises UserError at the end of the file."""
        while True:
            while self._place < len(self._text):
                if not self._text[self._place].isspace():
                    return self._text[self._place]
                self.skip(1)
            if not self._more():
                raise UserError(f"{self._file}: not JSON: it ends before its list does (byte {self._offset})")

    def skip(self, characters: int) -> None:
        """Move on by so many characters."""
        passed = self._text[self._place : self._place + characters]
        self._offset += len(passed.encode())
        self._place += characters

    def value(self) -> RowRef:
        """The value under the cursor; the cursor moves behind it. Raises UserError when it is not JSON."""
        while True:
            try:
                raw, end = self._decode(self._text, self._place)
            except json.JSONDecodeError as error:
                if self._more():
                    continue
                raise UserError(f"{self._file}: not JSON at byte {self._offset}: {error.msg}") from error
            unfinished = end == len(self._text) or self._text[end] in ".eE"  # a number may go on in the next chunk
            if unfinished and self._more():
                continue
            start = self._offset
            self.skip(end - self._place)
            return RowRef([start, self._offset - start], raw)

    def _more(self) -> bool:
        chunk = self._stream.read(_CHUNK)
        if not chunk:
            return False
        try:
            text = self._characters.decode(chunk)
        except UnicodeDecodeError as error:
            raise UserError(f"{self._file}: not JSON: {error}; it must be UTF-8") from error
        self._text = self._text[self._place :] + text
        self._place = 0
        return True


class JsonLines:
    """One JSON row a line; empty lines don't count. A line that is not JSON is a bad row, not a bad file."""

    parses = True

    def locate(self, file: StoragePath) -> Iterator[RowRef]:
        """See Format."""
        offset = rows = 0
        with file.filesystem.open_input_stream(file.path) as stream:
            for line in io.BufferedReader(_Raw(stream), _CHUNK):
                if line.strip():
                    rows += 1
                    yield RowRef([offset, len(line)], _parsed(line))
                offset += len(line)
        if not rows:
            raise UserError(f"{file}: holds no row")

    def read(self, file: StoragePath, wheres: Sequence[Any]) -> Iterator[Any]:
        """See Format."""
        return (_parsed(content) for content in _read_ranges(file, wheres))


class _Raw(io.RawIOBase):
    """A pyarrow input stream as Python's io knows one."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return f"not JSON: {error}"


def _read_ranges(file: StoragePath, ranges: Sequence[Any]) -> Iterator[bytes]:
    """The bytes at [offset, size], neighbours read together."""
    with file.filesystem.open_input_file(file.path) as stream:
        start, held = 0, b""
        for number, (offset, size) in enumerate(ranges):
            if not start <= offset or offset + size > start + len(held):
                start, end = offset, _run_end(ranges, number)
                stream.seek(start)
                held = stream.read(end - start)
            yield held[offset - start : offset - start + size]


def _run_end(ranges: Sequence[Any], first: int) -> int:
    end: int = ranges[first][0] + ranges[first][1]
    for offset, size in ranges[first + 1 :]:
        if not 0 <= offset - end <= _GAP or end - ranges[first][0] > _CHUNK:
            break
        end = offset + size
    return end


class Parquet:
    """Parquet tables, Hugging Face `datasets` exports among them; images may lie in the rows."""

    parses = False

    def locate(self, file: StoragePath) -> Iterator[RowRef]:
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

    def read(self, file: StoragePath, wheres: Sequence[Any]) -> Iterator[Any]:
        """See Format."""
        table, held = None, -1
        with pq.ParquetFile(file.path, filesystem=file.filesystem) as parquet:
            for group, row in wheres:
                if group != held:
                    table, held = parquet.read_row_group(group), group
                assert table is not None
                yield table.slice(row, 1).to_pylist()[0]


class WebDataset:
    """Tars of samples: members that share a name up to its first dot. `.json` is the row, or `.txt` a caption."""

    parses = False

    def locate(self, file: StoragePath) -> Iterator[RowRef]:
        """See Format."""
        key: str | None = None
        members: dict[str, Any] = {}
        try:
            with file.filesystem.open_input_file(file.path) as stream, tarfile.open(fileobj=stream) as tar:
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
            raise UserError(f"{file}: not a whole tar ({error})") from error
        if not members:
            raise UserError(f"{file}: holds no sample")
        yield RowRef({"key": key, **members})

    def read(self, file: StoragePath, wheres: Sequence[Any]) -> Iterator[Any]:
        """See Format."""
        with file.filesystem.open_input_file(file.path) as stream:
            for where in wheres:
                members = {suffix: span for suffix, span in where.items() if suffix != "key"}
                yield self._row(where["key"], {suffix: _at(stream, span) for suffix, span in members.items()})

    def _row(self, key: str, members: dict[str, bytes]) -> Any:
        images = [content for suffix, content in sorted(members.items()) if _is_image(suffix)]
        if "json" in members:
            raw = _parsed(members["json"])
            if isinstance(raw, dict):
                raw = {"id": key, **raw}
                if images:
                    raw["image"] = images
            return raw
        if "txt" in members and images:
            caption = members["txt"].decode("utf-8", errors="replace")
            turns = [{"from": "human", "value": "<image>" * len(images)}, {"from": "gpt", "value": caption}]
            return {"id": key, "image": images, "conversations": turns}
        return f"{key}: has neither .json nor .txt with a image, only {', '.join(sorted(members))}"


def _split_name(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _is_image(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in _IMAGE_SUFFIXES


def _at(stream: Any, span: Sequence[int]) -> bytes:
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
    """The format that a file's name tells. Raises UserError when it tells none."""
    for suffix, name in SUFFIXES.items():
        if file.name.lower().endswith(suffix):
            return name
    raise UserError(f"{file}: cannot tell its format by its name; set format to one of {', '.join(FORMATS)}")
