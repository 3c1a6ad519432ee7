"""LLaVA JSON and JSON Lines."""

import codecs
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from raylava.corpus.row_format import (
    LONGEST_MAGIC,
    Part,
    RowRef,
    check_encoding,
    limit_nesting,
    parse_json,
    read_span,
    unreadable,
)
from raylava.errors import UserError
from raylava.storage import READ_BYTES, StoragePath

_BYTE_ORDER_MARK = "\ufeff"
_LONGEST_TOKEN = 16  # characters of the longest token that may be cut off: -Infinity, or two escaped surrogates


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
        return (parse_json(content) for content in _read_ranges(file, offsets))

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
        self._skip_byte_order_mark()

    def _skip_byte_order_mark(self) -> None:
        while len(self._text) < 4 and self._read_chunk():
            pass
        if self._text.startswith(_BYTE_ORDER_MARK):
            self.skip(1)

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
                brackets = sum(self._text.count(bracket, self._position, end) for bracket in "[{")
                raw = limit_nesting(raw, brackets)
            except json.JSONDecodeError as error:
                if self._may_be_incomplete(error) and self._read_chunk():
                    continue
                raise UserError(f"{self._file}: not JSON at byte {self._byte_offset}: {error.msg}") from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nesting as deep
                raw, end = unreadable(error), self._end_of_value()
            unfinished = end == len(self._text) or self._text[end] in ".eE"  # a number may continue in the next chunk
            if unfinished and self._read_chunk():
                continue
            start = self._byte_offset
            self.skip(end - self._position)
            return RowRef([start, self._byte_offset - start], raw)

    def _may_be_incomplete(self, error: json.JSONDecodeError) -> bool:
        """Return whether the text after what has been read could make the value valid."""
        return error.msg.startswith("Unterminated string") or len(self._text) - error.pos < _LONGEST_TOKEN

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
        if self._bytes_read == 0:
            check_encoding(self._file, chunk)
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
            if not part.start:
                check_encoding(file, reader.peek(LONGEST_MAGIC))
            else:
                offset += len(reader.readline()) - 1  # the line that began before the part, or the end of one
            while part.stop is None or offset < part.stop:
                line = reader.readline()
                if not line:
                    break
                if line.strip():
                    rows += 1
                    yield RowRef([offset, len(line)], parse_json(line))
                offset += len(line)
        if not rows and part.stop is None:
            raise UserError(f"{file}: contains no rows")

    def read_rows(self, file: StoragePath, offsets: Sequence[Any], max_image_bytes: int | None = None) -> Iterator[Any]:
        """See Format."""
        return (parse_json(content) for content in _read_ranges(file, offsets))


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


def _read_ranges(file: StoragePath, ranges: Sequence[Any]) -> Iterator[bytes]:
    """Yield the bytes of each [offset, size] range."""
    with file.open_random() as stream:
        for span in ranges:
            yield read_span(stream, span)
