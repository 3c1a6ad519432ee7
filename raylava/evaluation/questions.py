"""Custom benchmark files: JSONL with one question per line, or LLaVA JSON, where each human turn is a question.

The history of a question from LLaVA JSON is the conversation before it, with the reference answers.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from raylava.config.recipe import Benchmark
from raylava.corpus.formats import FORMATS
from raylava.corpus.quarantine import BadRow
from raylava.corpus.rows import image_names, matches_filters, parse_row
from raylava.errors import UserError, first_line
from raylava.models.templates import IMAGE_TOKEN
from raylava.storage import StoragePath

# With fewer references no answer can score 1: each is left out in turn, and three of the others must match.
_MIN_VQA_REFERENCES = 4


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    `image` is a path below the benchmark's image folder, or None for a text-only question. `references` is what the
    metric compares with, in most benchmarks the correct answers. `history` holds the (question, answer) pairs that
    precede it; the image belongs to the first turn. Questions of the same `unit` are scored together (the two of an
    image in MME, a pair in MMVP).
    """

    question_id: str
    image: str | None
    text: str
    category: str
    references: tuple[str, ...]
    history: tuple[tuple[str, str], ...] = ()
    unit: str = ""


@dataclass(frozen=True)
class GeneratedAnswer:
    """A model's answer. If the image cannot be shown, `text` is None and `problem` says why."""

    question_id: str
    prompt: str
    text: str | None
    problem: str | None = None


def read_questions(file: StoragePath, benchmark: Benchmark) -> list[Question]:
    """Return the questions of a custom benchmark that its filters select.

    Raises UserError if the file is missing, is in neither format, has no selected question, or has a question that its
    metric cannot score.
    """
    if not file.exists():
        raise UserError(f"evaluate.{benchmark.name}.questions: {file}: no such file")
    if file.is_folder():
        raise UserError(
            f"evaluate.{benchmark.name}.questions: {file}: a folder; name the file of questions, or set `benchmark`, "
            "which reads the official files of one"
        )
    read = _read_jsonl if file.name.endswith(".jsonl") else _read_llava
    questions = [_categorize(question, benchmark) for question in read(file, benchmark)]
    if not questions and benchmark.include == ("*",) and not benchmark.exclude:
        raise UserError(f"{file}: contains no question; each line needs question_id, text and answer")
    questions = questions[: benchmark.max_rows]
    if not questions:
        raise UserError(f"evaluate.{benchmark.name}: include and exclude select no question of {file}")
    _check_ids(questions, file)
    return [_validate_references(question, benchmark.metric, file) for question in questions]


def questions_fingerprint(questions: list[Question], image_sizes: dict[str, int]) -> str:
    """Return the SHA-256 of the questions, their references and the sizes of their images in bytes."""
    entries = [asdict(question) | {"bytes": image_sizes.get(question.image or "")} for question in questions]
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _check_ids(questions: list[Question], file: StoragePath) -> None:
    seen: set[str] = set()
    for question in questions:
        if question.question_id in seen:
            raise UserError(
                f"{file}: two questions have the id {question.question_id!r}; answers are matched by id, so rename one"
            )
        seen.add(question.question_id)


def _validate_references(question: Question, metric: str, file: StoragePath) -> Question:
    """Return the question with its references in the form the metric needs.

    Raises UserError if no answer to the question could be scored as correct.
    """
    name = f"{file}: question {question.question_id!r}"
    if not question.references:
        raise UserError(f"{name} has no answer; add one, or remove the question")
    if metric == "vqa_accuracy" and len(question.references) < _MIN_VQA_REFERENCES:
        count = len(question.references)
        raise UserError(f"{name} has {count} answers; vqa_accuracy needs at least {_MIN_VQA_REFERENCES}")
    if metric != "yes_no":
        return question
    labels = tuple(reference.strip().lower() for reference in question.references)
    if labels[0] not in ("yes", "no"):
        raise UserError(f"{name} has the answer {question.references[0]!r}; yes_no needs yes or no")
    return dataclasses.replace(question, references=labels)


def _read_jsonl(file: StoragePath, benchmark: Benchmark) -> Iterator[Question]:
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error}); save it as UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if matches_filters(image_names(fields), benchmark.include, benchmark.exclude):
                yield _jsonl_question(fields)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{file}:{number}: not a question ({first_line(error)}); each line needs question_id, text and answer "
                "(or answers), and may have image and category"
            ) from error


def _jsonl_question(fields: dict[str, Any]) -> Question:
    answers = fields["answers"] if "answers" in fields else [fields["answer"]]
    references = tuple(str(answer["answer"] if isinstance(answer, dict) else answer) for answer in answers)
    question_id, category = str(fields["question_id"]), str(fields.get("category", "all"))
    image = fields.get("image") or None
    if not isinstance(image, str | None):
        raise ValueError(f"image is a {type(image).__name__}, not a path")
    return Question(question_id, image, str(fields["text"]), category, references)


def _read_llava(file: StoragePath, benchmark: Benchmark) -> Iterator[Question]:
    for number, row_ref in enumerate(FORMATS["llava_json"].scan(file)):
        if not matches_filters(image_names(row_ref.raw), benchmark.include, benchmark.exclude):
            continue
        try:
            row = parse_row(row_ref.raw, f"#{number}")
        except BadRow as problem:
            raise UserError(f"{file}: row {number} is not a conversation: {problem}") from problem
        if len(row.images) > 1:
            raise UserError(f"{file}: row {number} has {len(row.images)} images; a question has at most one")
        image = str(row.images[0]) if row.images else None
        history: tuple[tuple[str, str], ...] = ()
        for index, (human, answer) in enumerate(zip(row.turns[::2], row.turns[1::2], strict=False)):
            text = human.text.replace(IMAGE_TOKEN, "").strip()
            yield Question(f"{row.sample_id}-{index}", image, text, "all", (answer.text,), history)
            history = (*history, (text, answer.text))


def _categorize(question: Question, benchmark: Benchmark) -> Question:
    """Return the question with the first category whose pattern matches its text, or unchanged if none does."""
    for category, pattern in benchmark.categories.items():
        if re.search(pattern, question.text):
            return dataclasses.replace(question, category=category)
    return question
