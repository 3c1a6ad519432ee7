"""Anybody's answers to a benchmark → its score: the official files and the answers file in, a Result out."""

import json
from typing import Any

from raylava.errors import UserError
from raylava.evaluate.answers import joined, read_said
from raylava.evaluate.official import OFFICIAL, read_official
from raylava.evaluate.questions import Question, read_questions
from raylava.evaluate.score.rules import RULES, judged, score
from raylava.evaluate.score.tally import Result
from raylava.recipe import Benchmark
from raylava.storage import Place, place

OWN = "own"


def questions_of(name: str, data: str, rule: str = "exact_match") -> tuple[list[Question], str]:
    """A benchmark's questions and the rule they are scored by; for one's `own`, `data` is the file of questions.

    Raises UserError for an unknown name, and for files that don't hold what they should.
    """
    if name == OWN:
        if rule not in RULES:
            raise UserError(f"--rule {rule}: known here: {', '.join(RULES)}")
        return read_questions(place(data), Benchmark(name=OWN, questions=data)), rule
    if name not in OFFICIAL:
        raise UserError(f"{name}: no such benchmark; known here: {', '.join([*OFFICIAL, OWN])}")
    return read_official(name, place(data)), OFFICIAL[name].rule


def score_file(
    name: str, data: str, answers: str, rule: str = "exact_match", protocol: str = "", grades: str | None = None
) -> Result:
    """Score a file of answers; of MM-Vet, a judge's file of grades. Raises UserError for what doesn't fit together."""
    questions, rule = questions_of(name, data, rule)
    if rule == "judged":
        if grades is None:
            raise UserError(f"{name} is graded by a judge; give its reply file as --grades, or a program as --judge")
        return judged(name, questions, read_grades(place(grades), questions))
    if protocol and protocol not in RULES[rule]:
        raise UserError(f"--protocol {protocol}: {name} has {', '.join(RULES[rule])}")
    return score(name, rule, questions, joined(read_said(place(answers)), questions, answers), protocol)


def read_grades(file: Place, questions: list[Question]) -> dict[str, float | None]:
    """A judge's reply file: JSON of grades by question id, each a number or the official `score` list (its mean)."""
    try:
        found: dict[str, float | None] = {
            number: _grade(entry) for number, entry in json.loads(file.read_bytes()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise UserError(
            f"{file}: not a file of grades ({type(error).__name__} {error}); it maps question ids to numbers"
        ) from error
    known = {question.question_id for question in questions}
    for number in found:
        if number not in known:
            raise UserError(f"{file}: the grade of {number!r} has no question in the benchmark's files")
    return found


def _grade(entry: Any) -> float:
    if isinstance(entry, dict):
        entry = entry["score"]
    if isinstance(entry, list):
        entry = sum(entry) / len(entry)
    return float(entry)
