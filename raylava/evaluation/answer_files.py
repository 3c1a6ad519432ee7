"""Reading files of answers: LLaVA's JSONL, which raylava writes as well, and the benchmarks' official result files."""

import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raylava.errors import UserError, first_line
from raylava.evaluation.benchmarks.files import OPTION_LETTER_SUFFIX, SHORT_ANSWER_SUFFIX
from raylava.evaluation.questions import Question
from raylava.storage import StoragePath

# The fields of the formats that state an answer. MMVP's own files also have the label, in `answer`.
_TEXT_FIELDS = {
    ("text",): "text",
    ("answer",): "answer",
    ("prediction",): "prediction",
    ("response",): "response",
    ("answer", "response"): "response",
}
_ID_FIELDS = {"question_id", "questionId"}
_FORMAT_ERRORS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
_ADDED_BY_TOOLKITS = re.compile(r"<image>|Please answer yes or no\.")


@dataclass(frozen=True)
class Prediction:
    """One entry of a file of answers; `text` is None if the entry records that there is no answer."""

    question_id: str
    prompt: str
    text: str | None


def read_predictions(file: StoragePath) -> list[Prediction]:
    """Read answers from JSONL of question_id and text, or JSON: a mapping of ids to texts or a list of results.

    The text of an entry is in `text` (LLaVA), `answer` (VQAv2), `prediction` (GQA) or `response` (MMVP). Raises
    UserError, with the line or entry, if the file is missing, has no such format or leaves open which field it is.
    """
    try:
        content = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)}); give a file of answers in UTF-8") from error
    predictions = [_read_entry(f"{file}{place}", parse) for place, parse in _entries(str(file), content)]
    if not predictions:
        raise UserError(f"{file}: contains no answers; each entry needs question_id and text")
    return predictions


def _read_entry(place: str, parse: Callable[[], Any]) -> Prediction:
    try:
        return _prediction(parse())
    except _FORMAT_ERRORS as error:
        raise UserError(
            f"{place}: not a file of answers ({first_line(error)}); each entry needs question_id and text"
        ) from error


def _entries(file: str, content: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield (place in the file, function that returns the entry) of each answer."""
    numbered = enumerate(content.split("\n"), 1)  # splitlines would also split at U+2028
    lines = [(number, line) for number, line in numbered if line.strip()]
    if lines and _is_json_object(lines[0][1]) and (len(lines) > 1 or _ID_FIELDS & json.loads(lines[0][1]).keys()):
        for number, line in lines:
            yield f":{number}", functools.partial(json.loads, line)
        return
    for name, entry in _read_entry_list(file, content):
        yield f": entry {name!r}", functools.partial(dict, entry)


def _read_entry_list(file: str, content: str) -> list[tuple[Any, Any]]:
    """Return (name, entry) of each answer in a JSON document: a mapping of ids to texts, or a list of results."""
    try:
        document = json.loads(content)
        if isinstance(document, dict):
            return [(name, {"question_id": name, "text": text}) for name, text in document.items()]
        return list(enumerate(document))
    except _FORMAT_ERRORS as error:
        raise UserError(
            f"{file}: not a file of answers ({first_line(error)}); it must be JSON Lines, a list or a mapping"
        ) from error


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _prediction(entry: dict[str, Any]) -> Prediction:
    question_id = entry["question_id"] if "question_id" in entry else entry["questionId"]
    fields = tuple(name for name in ("text", "answer", "prediction", "response") if name in entry)
    if fields not in _TEXT_FIELDS:
        found = " and ".join(fields) or "no text"
        raise ValueError(f"question {question_id!r} has {found}, which leaves open what the model said")
    text = entry[_TEXT_FIELDS[fields]]
    if not isinstance(text, str | int | float | None):
        raise ValueError(f"question {question_id!r} has a {type(text).__name__} for a text")
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
