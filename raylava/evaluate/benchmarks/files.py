"""Helpers of the benchmark modules: finding and reading official files, and the suffixes of LLaVA's prompts."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from raylava.errors import UserError
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
    """Return the content of a JSON file."""
    return json.loads(file.read_bytes())


def read_jsonl(file: StoragePath) -> Iterator[dict[str, Any]]:
    """Yield the content of each line of a JSON Lines file."""
    for line in file.read_bytes().decode("utf-8").split("\n"):  # splitlines would also split at U+2028
        if line.strip():
            yield json.loads(line)


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
