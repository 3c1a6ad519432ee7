"""Reading files of answers: LLaVA's JSONL, which raylava writes as well, and the benchmarks' official result files."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raylava.errors import UserError, first_line
from raylava.evaluate.benchmarks.files import OPTION_LETTER_SUFFIX, SHORT_ANSWER_SUFFIX
from raylava.evaluate.questions import Question
from raylava.storage import StoragePath

_ADDED_BY_TOOLKITS = re.compile(r"<image>|Please answer yes or no\.")


@dataclass(frozen=True)
class Prediction:
    """One entry of a file of answers; `text` is None if the entry records that there is no answer."""

    question_id: str
    prompt: str
    text: str | None


def read_predictions(file: StoragePath) -> list[Prediction]:
    """Read answers from JSONL of question_id and text, or JSON: a mapping of ids to texts or a list of results.

    Raises UserError if the file is missing or has neither format.
    """
    if not file.exists():
        raise UserError(f"{file}: no such file")
    try:
        return [_prediction(entry) for entry in _entries(file.read_bytes().decode("utf-8"))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file}: not a file of answers ({first_line(error)}); each entry needs question_id and text"
        ) from error


def _entries(content: str) -> Iterator[Any]:
    lines = [line for line in content.split("\n") if line.strip()]  # splitlines would also split at U+2028
    if lines and _is_json_object(lines[0]):
        first = json.loads(lines[0])
        if len(lines) > 1 or "question_id" in first:
            yield from (json.loads(line) for line in lines)
            return
    document = json.loads(content)
    if isinstance(document, dict):
        yield from ({"question_id": question_id, "text": text} for question_id, text in document.items())
    else:
        yield from document


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _prediction(entry: dict[str, Any]) -> Prediction:
    question_id = entry["question_id"] if "question_id" in entry else entry["questionId"]
    (text,) = (entry[name] for name in ("text", "answer", "prediction") if name in entry)
    if (entry.get("metadata") or {}).get("problem"):
        text = None
    return Prediction(str(question_id), str(entry.get("prompt", "")), None if text is None else str(text))


def join_predictions(
    predictions: Sequence[Prediction], questions: Sequence[Question], file: str
) -> dict[str, str | None]:
    """Return answers by question id.

    LLaVA's MME files give both questions of an image the same id; these are matched by their prompt. Raises UserError
    for an answer without a question and for two answers to one question.
    """
    by_id = {question.question_id: question for question in questions}
    by_prompt = {(question.unit, normalize_prompt(question.text)): question for question in questions if question.unit}
    answers: dict[str, str | None] = {}
    for prediction in predictions:
        prompt_key = (_mme_unit(prediction.question_id), normalize_prompt(prediction.prompt))
        question = by_id.get(prediction.question_id) or by_prompt.get(prompt_key)
        if question is None:
            raise UserError(
                f"{file}: the answer to {prediction.question_id!r} has no question in the benchmark's files"
            )
        if question.question_id in answers:
            raise UserError(f"{file}: two answers to {question.question_id!r}; remove one")
        answers[question.question_id] = prediction.text
    return answers


def _mme_unit(question_id: str) -> str:
    """Return MME's task and image without subfolder and extension: `artwork/images/1.jpg` becomes `artwork/1`."""
    task, _, path = question_id.partition("/")
    return f"{task}/{path.rpartition('/')[2].rpartition('.')[0]}"


def normalize_prompt(prompt: str) -> str:
    """Return a prompt without the instructions and placeholders that toolkits add, and with single spaces."""
    text = _ADDED_BY_TOOLKITS.sub(" ", prompt)
    for suffix in (SHORT_ANSWER_SUFFIX, OPTION_LETTER_SUFFIX):
        text = text.replace(suffix.strip(), " ")
    return " ".join(text.split())
