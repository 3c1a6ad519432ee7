"""Helpers of the benchmark modules: finding and reading official files, and the suffixes of LLaVA's prompts."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from raylava.errors import UserError, first_line
from raylava.storage import StoragePath

SHORT_ANSWER_SUFFIX = "\nAnswer the question using a single word or phrase."
OPTION_LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."


def find_file(data: StoragePath, *names: str) -> StoragePath | None:
    """Return the first of the named files that exists, or None."""
    return next((data / name for name in names if (data / name).exists()), None)


def require_file(data: StoragePath, *names: str) -> StoragePath:
    """Return the first of the named files that exists. Raises UserError if none does."""
    file = find_file(data, *names)
    if file is None:
        raise UserError(f"{data}: {names[0]} is missing; give the folder of the official files as --data")
    return file


def read_json(file: StoragePath) -> Any:
    """Return the content of a JSON file. Raises UserError for a damaged file."""
    return _parse(str(file), file.read_bytes())


def read_jsonl(file: StoragePath) -> Iterator[dict[str, Any]]:
    """Yield the object in each line of a JSON Lines file. Raises UserError, with the line, for anything else."""
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if line.strip():
            entry = _parse(f"{file}:{number}", line)
            if not isinstance(entry, dict):
                raise UserError(f"{file}:{number}: a {type(entry).__name__}, not an object; download the file again")
            yield entry


def _parse(place: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({first_line(error)}); download the file again") from error


def check_no_label_left(labels: Mapping[Any, Any], question_file: StoragePath) -> None:
    """Raise UserError if labels remain that no question has used."""
    if labels:
        raise UserError(f"{question_file}: {len(labels)} labels have no question; the first is {next(iter(labels))}")


def append_once(text: str, suffix: str) -> str:
    """Return the text with the suffix, which is not repeated."""
    return text if text.endswith(suffix) else text + suffix


def short_answer(text: str) -> str:
    """Return the question with LLaVA's request for a short answer."""
    return append_once(text, SHORT_ANSWER_SUFFIX)
