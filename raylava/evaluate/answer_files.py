"""Files of answers: LLaVA's JSONL (ours too) and the official result files; joined to questions by key."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raylava.errors import UserError
from raylava.evaluate.official_benchmarks import LETTER, SHORT
from raylava.evaluate.questions import Question
from raylava.storage import StoragePath

_HUNG_ON = re.compile(r"<image>|Please answer yes or no\.")


@dataclass(frozen=True)
class Prediction:
    """A line of an answers file. `text` is None where the file itself says that there is no answer."""

    question_id: str
    prompt: str
    text: str | None


def read_predictions(file: StoragePath) -> list[Prediction]:
    """The answers of a file: JSONL of question_id and text; or JSON, a mapping of ids to texts or a list of results.

    Raises UserError, with the line, for what is neither.
    """
    if not file.exists():
        raise UserError(f"{file}: no such file")
    try:
        return [_said(one) for one in _entries(file.read_bytes().decode("utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: not a file of answers ({type(error).__name__} {error}); each has question_id and text"
        ) from error


def _entries(content: str) -> Iterator[Any]:
    lines = [line for line in content.split("\n") if line.strip()]  # splitlines would cut at U+2028 as well
    if lines and _is_whole(lines[0]):
        whole = json.loads(lines[0])
        if len(lines) > 1 or "question_id" in whole:
            yield from (json.loads(line) for line in lines)
            return
    whole = json.loads(content)
    if isinstance(whole, dict):
        yield from ({"question_id": key, "text": text} for key, text in whole.items())
    else:
        yield from whole


def _is_whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _said(entry: dict[str, Any]) -> Prediction:
    number = entry["question_id"] if "question_id" in entry else entry["questionId"]
    (text,) = (entry[name] for name in ("text", "answer", "prediction") if name in entry)
    if (entry.get("metadata") or {}).get("problem"):
        text = None
    return Prediction(str(number), str(entry.get("prompt", "")), None if text is None else str(text))


def joined(said: Sequence[Prediction], questions: Sequence[Question], file: str) -> dict[str, str | None]:
    """Answers by question id. LLaVA's MME files give both questions of a image one id: there the prompt tells.

    Raises UserError for an answer without a question, and for two to one question.
    """
    by_id = {question.question_id: question for question in questions}
    by_prompt = {(question.unit, plain(question.text)): question for question in questions if question.unit}
    found: dict[str, str | None] = {}
    for one in said:
        question = by_id.get(one.question_id) or by_prompt.get((_unit(one.question_id), plain(one.prompt)))
        if question is None:
            raise UserError(f"{file}: the answer to {one.question_id!r} has no question in the benchmark's files")
        if question.question_id in found:
            raise UserError(f"{file}: two answers to {question.question_id!r}; leave one")
        found[question.question_id] = one.text
    return found


def _unit(question_id: str) -> str:
    """MME's image, whatever folder and ending the toolkit names it by: `artwork/images/1.jpg` is `artwork/1`."""
    task, _, rest = question_id.partition("/")
    return f"{task}/{rest.rpartition('/')[2].rpartition('.')[0]}"


def plain(prompt: str) -> str:
    """A prompt without what toolkits hang on it."""
    return " ".join(_HUNG_ON.sub(" ", prompt).replace(SHORT.strip(), " ").replace(LETTER.strip(), " ").split())
