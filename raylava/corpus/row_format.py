"""What every annotation file format implements, and what the formats share."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from raylava.corpus.quarantine import describe_error
from raylava.errors import UserError
from raylava.storage import StoragePath

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
LONGEST_MAGIC = 10  # bytes that `check_encoding` needs
_MAX_NESTING = 500  # levels
_UTF_16_OR_32 = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh91AY&SY": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}


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


def check_encoding(file: StoragePath, beginning: bytes) -> None:
    """Raise UserError for a file that begins as a compressed one, or as UTF-16."""
    for magic, name in _COMPRESSED.items():
        if beginning.startswith(magic):
            raise UserError(
                f"{file}: compressed with {name}, so that its rows cannot be read by position; decompress it"
            )
    if beginning.startswith(_UTF_16_OR_32):
        raise UserError(f"{file}: UTF-16 or UTF-32; convert it to UTF-8")


def parse_json(line: bytes) -> Any:
    """Return the parsed line, or a string that describes the error."""
    try:
        return limit_nesting(json.loads(line), line.count(b"[") + line.count(b"{"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return f"not JSON: {error}"
    except (ValueError, RecursionError) as error:
        return unreadable(error)


def limit_nesting(value: Any, brackets: int) -> Any:
    """Return a parsed value, or a string that describes it if it is nested too deeply.

    Python up to 3.12 reads about 1,000 levels, later versions ten times as many: rows must not depend on it. `brackets`
    is the number of opening brackets in the text.
    """
    if brackets > _MAX_NESTING and _nesting(value) > _MAX_NESTING:
        return unreadable(ValueError(f"nested more than {_MAX_NESTING} levels deep"))
    return value


def _nesting(value: Any) -> int:
    """Return how many lists and mappings lie within each other at the deepest place."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def unreadable(error: Exception) -> str:
    """Return the description of JSON that Python does not read."""
    return f"JSON that cannot be read: {describe_error(error)}"


def read_span(stream: Any, span: Sequence[int]) -> bytes:
    """Return the bytes of an [offset, size] range."""
    stream.seek(span[0])
    return stream.read(span[1])
