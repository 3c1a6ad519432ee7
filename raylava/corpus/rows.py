"""The rows of annotation files, parsed into one type whatever the file's format.

A malformed row raises BadRow and is quarantined.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from raylava.corpus.conversation import Turn
from raylava.corpus.quarantine import BadRow, Reason
from raylava.models.templates import IMAGE_TOKEN
from raylava.storage import StoragePath

_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "model": "gpt"}
ROW_FIELDS = ("id", "image", "images", "conversations", "messages")  # all that is read of a row
_MAX_ID = 1000  # characters of a row's own id that are kept


@dataclass(frozen=True)
class SourceRow:
    """One parsed row. `sample_id` is unique in the corpus; `images` are paths as written in the row, or bytes."""

    sample_id: str
    images: tuple[str | bytes, ...]
    turns: tuple[Turn, ...]


def matches_filters(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Return whether a row with these image paths matches the patterns. A row without image paths always matches."""
    included = all(any(fnmatch(name, pattern) for pattern in include) for name in names)
    return included and not any(fnmatch(name, pattern) for name in names for pattern in exclude)


def parse_row(raw: Any, id_suffix: str) -> SourceRow:
    """Parse a raw row (`conversations`, or `messages` of role and content). Raises BadRow when it is malformed."""
    if isinstance(raw, BadRow):  # found while it was read
        raise raw
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
