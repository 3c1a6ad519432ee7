"""Sources → rows of one type, whatever the files looked like. Reads annotations only, no images by path.

A file that is of no known format is the user's mistake (UserError); a row that is not one is set aside (BadRow).
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import pyarrow.fs as pafs

from raylava.config.recipe import Source
from raylava.corpus.conversation import Turn
from raylava.corpus.formats import FORMATS, SUFFIXES, Format, RowRef, format_of
from raylava.corpus.quarantine import BadRow, Reason
from raylava.errors import UserError
from raylava.models.templates import IMAGE_TOKEN
from raylava.storage import StoragePath, storage_path

_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "model": "gpt"}
_TAIL = 64 << 10  # bytes at a file's end: a Parquet footer, the last samples of a tar


@dataclass(frozen=True)
class Row:
    """One source row: a name that is unique in its corpus, its images (paths as written, or bytes), and its turns."""

    sample_id: str
    images: tuple[str | bytes, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class SelectedRow:
    """One row chosen for a corpus: which source, file and row, which repetition, and where in the file it lies."""

    source: int
    file: int
    row: int
    copy: int
    where: Any

    @property
    def suffix(self) -> str:
        """What makes a source's own id unique in the corpus (LLaVA's own files repeat ids)."""
        return f"#{self.source}.{self.file}.{self.row}" + (f"+{self.copy}" if self.copy else "")


class SourceFiles:
    """One source with its files found. `annotations` and `images` are absolute places."""

    def __init__(self, source: Source, annotations: str, images: str) -> None:
        self.source, self.annotations, self.images = source, annotations, images

    @property
    def files(self) -> list[StoragePath]:
        """The file, or the folder's files of known formats by name. Raises UserError when there is none."""
        root = storage_path(self.annotations)
        kind = root.info().type
        if kind == pafs.FileType.NotFound:
            raise UserError(f"{root}: no such file; set the source's annotations (or data=…)")
        if kind != pafs.FileType.Directory:
            return [root]
        found = [file for file in root.children() if file.name.lower().endswith(tuple(SUFFIXES))]
        if not found:
            raise UserError(f"{root}: holds no file of a known format ({', '.join(SUFFIXES)})")
        return found

    def format(self, file: StoragePath) -> Format:
        """How a file of this source is read."""
        return FORMATS[format_of(file) if self.source.format == "auto" else self.source.format]

    def picks(self, number: int) -> Iterator[SelectedRow]:
        """The rows that the source gives to its corpus, in order; `number` is the source's."""
        for file_number, row, located in itertools.islice(self.selected(), self.source.max_rows):
            for copy in range(_copies(self.source.sampling_weight, f"{number}.{file_number}.{row}")):
                yield SelectedRow(number, file_number, row, copy, located.where)

    def selected(self) -> Iterator[tuple[int, int, RowRef]]:
        """(file, row, located) of the rows that include and exclude choose. Raises UserError for what is unreadable."""
        source = self.source
        chooses = source.include != ("*",) or source.exclude
        for number, file in enumerate(self.files):
            form = self.format(file)
            if chooses and not form.parses:
                raise UserError(f"{file}: include and exclude choose by image path, which only JSON sources tell")
            for row, located in enumerate(_located(form, file)):
                if not chooses or matches_filters(located.raw, source.include, source.exclude):
                    yield number, row, located

    def identity(self) -> dict[str, Any]:
        """What the source is, wherever it lies: its files' content, and names and sizes of the images they name.

        JSON is hashed whole; of Parquet and tars, which may hold terabytes, size and last 64 KiB.
        Raises UserError when annotations can't be read or the image folder is missing.
        """
        contents = [file.sha256() if self.format(file).parses else _tail_identity(file) for file in self.files]
        names = {name for _, _, located in self.selected() for name in image_names(located.raw)}
        images = storage_path(self.images)
        if names and not images.is_folder():
            raise UserError(f"{images}: no such image folder; set the source's images (or data=…)")
        listing = json.dumps(sorted(sizes_below(images, names).items()))
        return {"annotations": contents, "images": hashlib.sha256(listing.encode()).hexdigest()}


def sizes_below(root: StoragePath, names: set[str]) -> dict[str, int]:
    """Bytes of those of the named files that are below the root."""
    return {name: size for name, size in root.walk_files() if name in names} if names else {}


def _located(form: Format, file: StoragePath) -> Iterator[RowRef]:
    try:
        yield from form.locate(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error})") from error


def _tail_identity(file: StoragePath) -> dict[str, Any]:
    size = file.info().size
    with file.filesystem.open_input_file(file.path) as stream:
        stream.seek(max(0, size - _TAIL))
        return {"bytes": size, "tail": hashlib.sha256(stream.read()).hexdigest()}


def _copies(weight: float, row: str) -> int:
    """How often a row comes in: the whole part of the weight, and once more by a draw that only its number decides."""
    draw = int.from_bytes(hashlib.sha256(row.encode()).digest()[:8], "big") / 2**64
    return int(weight) + (draw < weight - int(weight))


def matches_filters(raw: Any, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether patterns choose a raw row; a row without image paths, or one too broken to say, is always taken."""
    names = image_names(raw)
    wanted = all(any(fnmatch(name, pattern) for pattern in include) for name in names)
    return wanted and not any(fnmatch(name, pattern) for name in names for pattern in exclude)


def parse_row(raw: Any, suffix: str) -> Row:
    """A raw row (`conversations`, or `messages` of role and content) as a Row. Raises BadRow when it isn't one."""
    if not isinstance(raw, dict):
        raise BadRow(Reason.NOT_A_ROW, raw if isinstance(raw, str) else f"a {type(raw).__name__}, not an object")
    turns = raw.get("conversations") or raw.get("messages")
    if not isinstance(turns, list) or not turns:
        raise BadRow(Reason.NO_TURNS, "no list of `conversations` or `messages`, or an empty one")
    return Row(sample_id(raw, suffix), _images(raw), _without_system([_turn(turn) for turn in turns]))


def sample_id(raw: Any, suffix: str) -> str:
    """The source's id, made unique in the corpus."""
    name = raw.get("id") if isinstance(raw, dict) else None
    return f"{name}{suffix}" if isinstance(name, str | int) else suffix


def _turn(raw: Any) -> Turn:
    if not isinstance(raw, dict):
        raise BadRow(Reason.NOT_A_ROW, f"a turn is a {type(raw).__name__}, not an object")
    speaker = raw.get("from", raw.get("role"))
    text = _text(raw.get("value", raw.get("content")))
    if speaker != "system" and (not isinstance(speaker, str) or speaker not in _SPEAKERS):
        raise BadRow(Reason.NOT_ALTERNATING, f"a turn is from {speaker!r}, not human or gpt")
    return Turn(_SPEAKERS.get(speaker, "system"), text)


def _text(content: Any) -> str:
    """A turn's text; of a list of parts, texts joined and each image as an image token."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join(IMAGE_TOKEN if part.get("type") == "image" else str(part.get("text") or "") for part in content)
    raise BadRow(Reason.NOT_A_ROW, "a turn without a text `value` or `content`")


def _without_system(turns: list[Turn]) -> tuple[Turn, ...]:
    """Gemma has no system turn: its text goes before the first human's."""
    if len(turns) > 1 and turns[0].speaker == "system" and turns[1].speaker == "human":
        turns = [Turn("human", f"{turns[0].text.strip()}\n\n{turns[1].text}"), *turns[2:]]
    return tuple(turns)


def _images(raw: dict[str, Any]) -> tuple[str | bytes, ...]:
    return tuple(_image(value) for value in _image_values(raw))


def _image(value: Any) -> str | bytes:
    """A path, or the bytes of a image that lies in the row (Hugging Face's struct of bytes and path among them)."""
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
    """The image paths that a raw row names."""
    return tuple(value for value in _image_values(raw) if isinstance(value, str))


def image_place(root: StoragePath, name: str) -> StoragePath:
    """TrialStatus an image path of a row lies. Raises BadRow when it would leave the root."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "~")) or "://" in name or ".." in parts or "\0" in name:
        raise BadRow(Reason.PATH_ESCAPES, repr(name))
    return root / "/".join(part for part in parts if part not in ("", "."))
