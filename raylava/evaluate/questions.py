"""Benchmark files → questions with references: JSONL of one a line, or LLaVA JSON where each human turn is one.

A turn of LLaVA JSON is asked with the conversation before it, reference answers included.
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
from raylava.corpus.sources import matches_filters, parse_row
from raylava.errors import UserError
from raylava.models.templates import IMAGE_TOKEN
from raylava.storage import StoragePath

_VQA_ANSWERS = 4  # fewer, and no answer can earn its whole credit: each is left out in turn, and three must match


@dataclass(frozen=True)
class Question:
    """One question: `image` is a path below the benchmark's image folder, or None for text alone.

    `references` are what its benchmark scores by: right answers, mostly. `history` is the conversation before it, as
    (question, answer) pairs; the image is shown at its start. `unit` names those that are scored together (MME's two
    of a image, MMVP's pair).
    """

    question_id: str
    image: str | None
    text: str
    category: str
    references: tuple[str, ...]
    history: tuple[tuple[str, str], ...] = ()
    unit: str = ""


@dataclass(frozen=True)
class Answer:
    """What the model said; `text` is None, with the `problem`, when the question's image could not be shown."""

    question_id: str
    prompt: str
    text: str | None
    problem: str | None = None


def read_questions(file: StoragePath, benchmark: Benchmark) -> list[Question]:
    """All selected questions of a benchmark. Raises UserError when the file holds none or is neither format."""
    if not file.exists():
        raise UserError(f"evaluate.{benchmark.name}.questions: {file}: no such file")
    read = _from_jsonl if file.name.endswith(".jsonl") else _from_llava
    questions = [_in_category(question, benchmark) for question in read(file, benchmark)]
    questions = questions[: benchmark.max_rows]
    if not questions:
        raise UserError(f"evaluate.{benchmark.name}: {file} holds no question that include and exclude select")
    _check_ids(questions, file)
    return [_scorable(question, benchmark.metric, file) for question in questions]


def _check_ids(questions: list[Question], file: StoragePath) -> None:
    seen: set[str] = set()
    for question in questions:
        if question.question_id in seen:
            raise UserError(f"{file}: two questions are called {question.question_id!r}; answers go by it, rename one")
        seen.add(question.question_id)


def _scorable(question: Question, rule: str, file: StoragePath) -> Question:
    """The question with references as its rule wants them. Raises UserError where it could never be right."""
    where = f"{file}: question {question.question_id!r}"
    if not question.references:
        raise UserError(f"{where} has no answer; give one, or leave the question out")
    if rule == "vqa_accuracy" and len(question.references) < _VQA_ANSWERS:
        raise UserError(f"{where} has {len(question.references)} answers; vqa_accuracy wants {_VQA_ANSWERS} or more")
    if rule != "yes_no":
        return question
    labels = tuple(reference.strip().lower() for reference in question.references)
    if labels[0] not in ("yes", "no"):
        raise UserError(f"{where} has the answer {question.references[0]!r}; yes_no wants yes or no")
    return dataclasses.replace(question, references=labels)


def identity(questions: list[Question], images: dict[str, int]) -> str:
    """SHA-256 over the questions with their references and the sizes of their images."""
    facts = [asdict(question) | {"bytes": images.get(question.image or "")} for question in questions]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _from_jsonl(file: StoragePath, benchmark: Benchmark) -> Iterator[Question]:
    for number, line in enumerate(file.read_bytes().decode("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            if matches_filters(raw, benchmark.include, benchmark.exclude):
                yield _jsonl_question(raw)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}:{number}: not a question ({error!r}); each line has question_id, text, answer (or answers), "
                "and may have image and category"
            ) from error


def _jsonl_question(raw: dict[str, Any]) -> Question:
    known = raw["answers"] if "answers" in raw else [raw["answer"]]
    references = tuple(str(one["answer"] if isinstance(one, dict) else one) for one in known)
    return Question(
        str(raw["question_id"]), raw.get("image"), str(raw["text"]), str(raw.get("category", "all")), references
    )


def _from_llava(file: StoragePath, benchmark: Benchmark) -> Iterator[Question]:
    for number, located in enumerate(FORMATS["llava_json"].locate(file)):
        if not matches_filters(located.raw, benchmark.include, benchmark.exclude):
            continue
        try:
            row = parse_row(located.raw, f"#{number}")
        except BadRow as bad:
            raise UserError(f"{file}: row {number} cannot be asked: {bad}") from bad
        if len(row.images) > 1:
            raise UserError(f"{file}: row {number} has {len(row.images)} images; a question takes one")
        image = str(row.images[0]) if row.images else None
        history: tuple[tuple[str, str], ...] = ()
        for turn, (human, answer) in enumerate(zip(row.turns[::2], row.turns[1::2], strict=False)):
            text = human.text.replace(IMAGE_TOKEN, "").strip()
            yield Question(f"{row.sample_id}-{turn}", image, text, "all", (answer.text,), history)
            history = (*history, (text, answer.text))


def _in_category(question: Question, benchmark: Benchmark) -> Question:
    for category, pattern in benchmark.categories.items():
        if re.search(pattern, question.text):
            return dataclasses.replace(question, category=category)
    return question
