"""Selects the rows of a recipe's sources and parses them into one row type, independent of the file format.

Reads annotations only, no image files. A file of an unknown format raises UserError; a malformed row raises BadRow and
is quarantined.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import pyarrow.fs as pafs

from raylava.config.recipe import Source
from raylava.corpus.conversation import Turn
from raylava.corpus.fetch import is_url
from raylava.corpus.formats import FORMATS, SUFFIXES, Format, RowRef, format_of
from raylava.corpus.quarantine import BadRow, Reason
from raylava.errors import UserError
from raylava.models.templates import IMAGE_TOKEN
from raylava.storage import StoragePath, storage_path

_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "model": "gpt"}
_MAX_ID = 1000  # characters of a row's own id that are kept
_TAIL_BYTES = 64 << 10  # the end of a file: a Parquet footer, the last samples of a tar


@dataclass(frozen=True)
class SourceRow:
    """One parsed row. `sample_id` is unique in the corpus; `images` are paths as written in the row, or bytes."""

    sample_id: str
    images: tuple[str | bytes, ...]
    turns: tuple[Turn, ...]


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

    @property
    def files(self) -> list[StoragePath]:
        """The annotation file, or the files of known formats in a folder, by name. Raises UserError for none."""
        root = storage_path(self.annotations)
        kind = root.info().type
        if kind == pafs.FileType.NotFound:
            raise UserError(f"{root}: no such file; set the source's annotations (or data=…)")
        if kind != pafs.FileType.Directory:
            return [root]
        files = [file for file in root.children() if file.name.lower().endswith(tuple(SUFFIXES))]
        if not files:
            raise UserError(f"{root}: contains no file of a known format ({', '.join(SUFFIXES)})")
        return files

    def format(self, file: StoragePath) -> Format:
        """Return the format of a file of this source."""
        return FORMATS[format_of(file) if self.source.format == "auto" else self.source.format]

    def selected_rows(self, number: int) -> Iterator[SelectedRow]:
        """Yield the rows that source number `number` contributes to its corpus, in order and with repetitions."""
        for file_number, row, row_ref in itertools.islice(self.matching_rows(), self.source.max_rows):
            for copy in range(_copies(self.source.sampling_weight, f"{number}.{file_number}.{row}")):
                yield SelectedRow(number, file_number, row, copy, row_ref.offset)

    def matching_rows(self) -> Iterator[tuple[int, int, RowRef]]:
        """Yield (file number, row number, reference) of the rows that match `include` and `exclude`.

        Raises UserError for unreadable files, and for filters on a format that does not expose its rows.
        """
        for number, file in enumerate(self.files):
            for row, row_ref in self._matching_rows(file):
                yield number, row, row_ref

    def _matching_rows(self, file: StoragePath) -> Iterator[tuple[int, RowRef]]:
        source, file_format = self.source, self.format(file)
        has_filters = source.include != ("*",) or source.exclude
        if has_filters and not file_format.exposes_rows:
            raise UserError(
                f"{file}: include and exclude select rows by image path, which works for JSON formats only; "
                "remove them or convert the file to JSON Lines"
            )
        for row, row_ref in enumerate(_scan(file_format, file)):
            if not has_filters or matches_filters(row_ref.raw, source.include, source.exclude):
                yield row, row_ref

    def image_names(self, file: StoragePath) -> Iterator[str]:
        """Yield the image paths, not the URLs, of a file's matching rows, of formats that expose them.

        Raises like `matching_rows`.
        """
        for _, row_ref in self._matching_rows(file):
            yield from (name for name in image_names(row_ref.raw) if not is_url(name))

    def content_hash(self, file: StoragePath) -> Any:
        """Return the SHA-256 of a JSON file; of other formats the size, and the SHA-256 of the last 64 KiB."""
        return file.sha256() if self.format(file).exposes_rows else _tail_fingerprint(file)


def file_sizes(root: StoragePath, names: set[str]) -> dict[str, int]:
    """Return the size in bytes of each named file below `root`; missing files are left out."""
    return {name: size for name, size in root.walk_files() if name in names} if names else {}


def _scan(file_format: Format, file: StoragePath) -> Iterator[RowRef]:
    try:
        yield from file_format.scan(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error})") from error


def _tail_fingerprint(file: StoragePath) -> dict[str, Any]:
    size = file.info().size
    with file.filesystem.open_input_file(file.path) as stream:
        stream.seek(max(0, size - _TAIL_BYTES))
        return {"bytes": size, "tail": hashlib.sha256(stream.read()).hexdigest()}


def _copies(weight: float, row_key: str) -> int:
    """Return the copies of a row: floor(weight), plus one with probability frac(weight), seeded by the row number."""
    draw = int.from_bytes(hashlib.sha256(row_key.encode()).digest()[:8], "big") / 2**64
    return int(weight) + (draw < weight - int(weight))


def matches_filters(raw: Any, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Return whether a raw row matches the patterns. Rows without image paths, even malformed ones, always match."""
    names = image_names(raw)
    included = all(any(fnmatch(name, pattern) for pattern in include) for name in names)
    return included and not any(fnmatch(name, pattern) for name in names for pattern in exclude)


def parse_row(raw: Any, id_suffix: str) -> SourceRow:
    """Parse a raw row (`conversations`, or `messages` of role and content). Raises BadRow when it is malformed."""
    if not isinstance(raw, dict):
        raise BadRow(Reason.NOT_A_ROW, raw if isinstance(raw, str) else f"a {type(raw).__name__}, not an object")
    turns = raw.get("conversations") or raw.get("messages")
    if not isinstance(turns, list) or not turns:
        raise BadRow(Reason.NO_TURNS, "no list of `conversations` or `messages`, or an empty one")
    return SourceRow(sample_id(raw, id_suffix), _images(raw), _without_system([_turn(turn) for turn in turns]))


def sample_id(raw: Any, id_suffix: str) -> str:
    """Return the row's id with the suffix that makes it unique in the corpus."""
    name = raw.get("id") if isinstance(raw, dict) else None
    if not isinstance(name, str | int):
        return id_suffix
    text = str(name)[:_MAX_ID].encode(errors="backslashreplace").decode()  # lone surrogates cannot be stored
    return f"{text}{id_suffix}"


def _turn(raw: Any) -> Turn:
    if not isinstance(raw, dict):
        raise BadRow(Reason.NOT_A_ROW, f"a turn is a {type(raw).__name__}, not an object")
    speaker = raw.get("from", raw.get("role"))
    text = _text(raw.get("value", raw.get("content")))
    if speaker != "system" and (not isinstance(speaker, str) or speaker not in _SPEAKERS):
        raise BadRow(Reason.NOT_ALTERNATING, f"a turn is from {speaker!r}, not human or gpt")
    return Turn(_SPEAKERS.get(speaker, "system"), text)


def _text(content: Any) -> str:
    """Return a turn's text. The parts of a list are joined, with an image token for each image."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join(IMAGE_TOKEN if part.get("type") == "image" else str(part.get("text") or "") for part in content)
    raise BadRow(Reason.NOT_A_ROW, "a turn without a text `value` or `content`")


def _without_system(turns: list[Turn]) -> tuple[Turn, ...]:
    """Prepend the text of a system turn to the first human turn, because Gemma's template has no system turn."""
    if len(turns) > 1 and turns[0].speaker == "system" and turns[1].speaker == "human":
        turns = [Turn("human", f"{turns[0].text.strip()}\n\n{turns[1].text}"), *turns[2:]]
    return tuple(turns)


def _images(raw: dict[str, Any]) -> tuple[str | bytes, ...]:
    return tuple(_image(value) for value in _image_values(raw))


def _image(value: Any) -> str | bytes:
    """Return an image's path, or the bytes of an embedded image (also from Hugging Face's bytes-and-path struct)."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return bytes(value["bytes"])
    if isinstance(value, dict):
        value = value.get("path")
    if isinstance(value, str | bytes) and value:
        return value
    raise BadRow(Reason.NOT_A_ROW, f"an image is a {type(value).__name__}, not a path or bytes")


def _image_values(raw: Any) -> list[Any]:
    value = raw.get("image", raw.get("images")) if isinstance(raw, dict) else None
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]


def image_names(raw: Any) -> tuple[str, ...]:
    """Return the image paths of a raw row."""
    return tuple(value for value in _image_values(raw) if isinstance(value, str))


def resolve_image_path(root: StoragePath, name: str) -> StoragePath:
    """Return the location of a row's image path below `root`. Raises BadRow when the path would leave `root`."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "~")) or "://" in name or ".." in parts or "\0" in name:
        raise BadRow(Reason.PATH_ESCAPES, repr(name))
    return root / "/".join(part for part in parts if part not in ("", "."))
