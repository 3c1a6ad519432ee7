"""LLaVA JSON → rows of one type, whatever the file looked like. Reads annotations only, no pictures.

A file that is not LLaVA JSON at all is the user's mistake (UserError); a row that is not one is set aside (BadRow).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from raylava.corpus.conversation import Turn
from raylava.corpus.quarantine import BadRow, Reason
from raylava.errors import UserError
from raylava.storage import Place

_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


@dataclass(frozen=True)
class Row:
    """One source row: its number in the file, its id, image paths as written, and its turns."""

    number: int
    sample_id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Selection:
    """Which rows of a file belong to a corpus, by image path (`fnmatch` patterns) and number."""

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    limit: int | None = None

    def takes(self, raw: Any) -> bool:
        """Whether a raw row belongs; a row without pictures, or one too broken to say, always does."""
        names = _image_names(raw) if isinstance(raw, dict) else ()
        if not names:
            return True
        wanted = all(any(fnmatch(name, pattern) for pattern in self.include) for name in names)
        return wanted and not any(fnmatch(name, pattern) for name in names for pattern in self.exclude)


def read_raw_rows(annotations: Place, selection: Selection) -> Iterator[tuple[int, Any]]:
    """(number, raw row) of the selected rows, in the file's order. Raises UserError when it isn't LLaVA JSON."""
    taken = 0
    for number, raw in enumerate(_load_list(annotations)):
        if selection.limit is not None and taken >= selection.limit:
            return
        if selection.takes(raw):
            taken += 1
            yield number, raw


def referenced_images(annotations: Place, selection: Selection) -> set[str]:
    """The image paths that the selected rows name. Raises UserError when the file isn't LLaVA JSON."""
    rows = read_raw_rows(annotations, selection)
    return {name for _, raw in rows if isinstance(raw, dict) for name in _image_names(raw)}


def _load_list(annotations: Place) -> list[Any]:
    try:
        content = annotations.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(
            f"{annotations}: no such file; set the corpus's annotations (or data=…) to a LLaVA JSON"
        ) from error
    except OSError as error:
        raise UserError(f"{annotations}: cannot be read ({error})") from error
    try:
        rows = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{annotations}: not JSON ({error}); LLaVA JSON is one list of rows") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{annotations}: LLaVA JSON is a non-empty list of rows, this is a {type(rows).__name__}")
    if not any(isinstance(row, dict) and "conversations" in row for row in rows):
        raise UserError(f"{annotations}: not LLaVA JSON: no row has `conversations`")
    return rows


def parse_row(number: int, raw: Any) -> Row:
    """A raw LLaVA row as a Row. Raises BadRow when it isn't one."""
    if not isinstance(raw, dict):
        raise BadRow(Reason.NOT_A_ROW, f"a {type(raw).__name__}, not an object")
    turns = raw.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRow(Reason.NO_TURNS, "no `conversations` list, or an empty one")
    return Row(number, sample_id(number, raw), _image_names(raw), tuple(_turn(turn) for turn in turns))


def sample_id(number: int, raw: Any) -> str:
    """The source's id, made unique by the row's number where it may repeat (LLaVA's own files repeat ids)."""
    name = raw.get("id") if isinstance(raw, dict) else None
    return f"{name}#{number}" if isinstance(name, str | int) else f"#{number}"


def _turn(raw: Any) -> Turn:
    speaker = raw.get("from") if isinstance(raw, dict) else None
    text = raw.get("value") if isinstance(raw, dict) else None
    if not isinstance(text, str):
        raise BadRow(Reason.NOT_A_ROW, "a turn without a text `value`")
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise BadRow(Reason.NOT_ALTERNATING, f"a turn is from {speaker!r}, not human or gpt")
    return Turn(_SPEAKERS[speaker], text)


def _image_names(raw: dict[str, Any]) -> tuple[str, ...]:
    value = raw.get("image", raw.get("images"))
    if value is None or value == "":
        return ()
    names: Sequence[Any] = value if isinstance(value, list) else [value]
    return tuple(str(name) for name in names)


def image_place(root: Place, name: str) -> Place:
    """Where an image path of a row lies. Raises BadRow when it would leave the root."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "~")) or "://" in name or ".." in parts or "\0" in name:
        raise BadRow(Reason.PATH_ESCAPES, repr(name))
    return root / "/".join(part for part in parts if part not in ("", "."))
