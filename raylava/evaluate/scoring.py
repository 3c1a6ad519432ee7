"""Anybody's answers to a benchmark → its score: the official files and the answers file in, a Result out."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raylava.corpus.sources import sizes_below
from raylava.errors import UserError
from raylava.evaluate.answers import joined, read_said
from raylava.evaluate.official import OFFICIAL, images_of, read_official
from raylava.evaluate.questions import Question, read_questions
from raylava.evaluate.score.rules import RULES, judged, score
from raylava.evaluate.score.tally import Result
from raylava.recipe import Benchmark
from raylava.storage import Place, join, place

OWN = "own"
OWN_RULES = ("exact_match", "vqa_accuracy", "yes_no")


@dataclass(frozen=True)
class Exam:
    """A benchmark ready to be asked: questions, the folder of their pictures, the rule and protocol of its score."""

    questions: list[Question]
    images: str
    rule: str
    protocol: str

    @cached_property
    def pictures(self) -> dict[str, int]:
        """Bytes of each picture that is there."""
        wanted = {question.image for question in self.questions if question.image}
        return sizes_below(place(self.images), wanted)


class Exams:
    """Benchmarks, each read once for all that are asked it: a sweep's variants, a model and its baselines."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, str], Exam] = {}

    def of(self, benchmark: Benchmark, root: str) -> Exam:
        """See exam_of."""
        key = (benchmark.model_dump_json(), root)
        if key not in self._read:
            self._read[key] = exam_of(benchmark, root)
        return self._read[key]


def exam_of(benchmark: Benchmark, root: str) -> Exam:
    """Read a benchmark's files; relative places start at `root`.

    Raises UserError for files that are missing, malformed or don't fit each other, and for an unknown protocol.
    """
    data, images = join(root, benchmark.questions), join(root, benchmark.images) if benchmark.images else ""
    if benchmark.kind == OWN:
        _check_protocol(OWN, benchmark.score, benchmark.protocol)
        return Exam(read_questions(place(data), benchmark), images or root, benchmark.score, benchmark.protocol)
    return official_exam(benchmark.kind, data, images, benchmark.protocol, benchmark.limit)


def official_exam(name: str, data: str, images: str = "", protocol: str = "", limit: int | None = None) -> Exam:
    """One of the paper's benchmarks, of its official files. Raises UserError as exam_of."""
    if name not in OFFICIAL:
        raise UserError(f"{name}: no such benchmark; known here: {', '.join([*OFFICIAL, OWN])}")
    rule = OFFICIAL[name].rule
    _check_protocol(name, rule, protocol)
    questions = read_official(name, place(data))[:limit]
    return Exam(questions, images or images_of(name, place(data)).uri, rule, protocol)


def exam_named(
    name: str,
    data: str,
    images: str,
    rule: str,
    protocol: str,
    limit: int | None,
    max_new_tokens: int | None,
    batch_size: int,
) -> tuple[Benchmark, Exam]:
    """A benchmark as a command names it, and its exam. Raises UserError as exam_of."""
    given: dict[str, Any] = {"questions": data, "images": images, "limit": limit, "batch_size": batch_size}
    if name == OWN:
        exam = _own(data, rule, images, limit, protocol)
        given |= {"score": rule, "protocol": protocol}
    else:
        exam = official_exam(name, data, images, protocol, limit)
        given |= {"protocol": protocol, "kind": name}
    tokens = max_new_tokens or (OFFICIAL[name].max_new_tokens if name in OFFICIAL else 32)
    return Benchmark(name=name, max_new_tokens=tokens, **given), exam


def _check_protocol(name: str, rule: str, protocol: str) -> None:
    known = RULES.get(rule, {})
    if protocol and protocol not in known:
        raise UserError(f"protocol {protocol}: {name} has {', '.join(known) or 'none to choose from'}")


def score_file(
    name: str, data: str, answers: str, rule: str = "exact_match", protocol: str = "", grades: str | None = None
) -> Result:
    """Score a file of answers; of MM-Vet, a judge's file of grades. For one's `own`, `data` is the file of questions.

    Raises UserError for what doesn't fit together.
    """
    exam = _own(data, rule, protocol=protocol) if name == OWN else official_exam(name, data, protocol=protocol)
    if exam.rule == "judged":
        if grades is None:
            raise UserError(f"{name} is graded by a judge; give its reply file as --grades")
        return judged(name, exam.questions, read_grades(place(grades), exam.questions))
    said = joined(read_said(place(answers)), exam.questions, answers)
    return score(name, exam.rule, exam.questions, said, protocol)


def _own(data: str, rule: str, images: str = "", limit: int | None = None, protocol: str = "") -> Exam:
    if rule not in OWN_RULES:
        raise UserError(f"--rule {rule}: known here: {', '.join(OWN_RULES)}")
    given: dict[str, Any] = {"questions": data, "images": images, "score": rule, "limit": limit, "protocol": protocol}
    return exam_of(Benchmark(name=OWN, **given), "")


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
