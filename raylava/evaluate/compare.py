"""Evaluations side by side: on the same questions, how far they differ, how sure that is, and where they part."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raylava.artifacts import Artifact
from raylava.errors import UserError
from raylava.evaluate.metrics.score_table import paired_interval

CREDIT = "credit.json"  # of an evaluation: what each question earned, by id
QUESTIONS = "questions.jsonl"
ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Asked:
    """A question as both were asked it: `said` and `credit` are the evaluations', in order."""

    question_id: str
    image: str | None
    text: str
    references: tuple[str, ...]
    said: tuple[str, ...]
    credit: tuple[float, ...]

    @property
    def parts(self) -> bool:
        """Whether they earned differently."""
        return len(set(self.credit)) > 1


@dataclass(frozen=True)
class Difference:
    """How much more credit an evaluation earned than the first, by question, with its 95 % interval."""

    name: str
    difference: float
    low: float
    high: float

    @property
    def spans_zero(self) -> bool:
        return self.low <= 0.0 <= self.high


@dataclass(frozen=True)
class Comparison:
    """Evaluations of one benchmark: each one's name and mean credit, the differences to the first, all questions."""

    benchmark: str
    images: str
    credit: Mapping[str, float]
    differences: Sequence[Difference]
    asked: Sequence[Asked]


def compare(evaluations: Sequence[Artifact]) -> list[Comparison]:
    """Group evaluations by benchmark and compare those of each with its first.

    Raises UserError for what is no scored evaluation, a benchmark with only one, and other questions under its name.
    """
    by_benchmark: dict[str, list[Artifact]] = {}
    for one in evaluations:
        if "figures" not in one.metrics:
            raise UserError(f"{one.path}: no scored evaluation; give folders below STORAGE/evaluate")
        by_benchmark.setdefault(one.metrics["benchmark"], []).append(one)
    for name, own in by_benchmark.items():
        if len(own) < 2:
            raise UserError(f"{own[0].path}: the only evaluation of {name}; give another to compare it with")
    return [_compared(name, own) for name, own in by_benchmark.items()]


def _compared(benchmark: str, evaluations: list[Artifact]) -> Comparison:
    names = _names(evaluations)
    credits = [json.loads((one.path / CREDIT).read_bytes()) for one in evaluations]
    first = credits[0]
    for one, credit in zip(evaluations, credits, strict=True):
        if credit.keys() != first.keys():
            apart = sorted(credit.keys() ^ first.keys())
            raise UserError(f"{one.path}: other questions than in {evaluations[0].path}: {', '.join(apart[:3])}")
        _check_alike(one, evaluations[0])
    differences = []
    for name, credit in list(zip(names, credits, strict=True))[1:]:
        apart_by = np.array([[credit[number] - first[number] for number in first]])
        low, high = paired_interval(apart_by)
        differences.append(Difference(name, float(apart_by.mean()), low, high))
    means = {name: float(np.mean(list(credit.values()))) for name, credit in zip(names, credits, strict=True)}
    asked = _asked(evaluations, credits)
    return Comparison(benchmark, str(evaluations[0].metrics["images"]), means, differences, asked)


def _check_alike(one: Artifact, first: Artifact) -> None:
    """The same ids may name other questions, and the same answers earn by other rules."""
    if one.record["content"]["questions"] != first.record["content"]["questions"]:
        raise UserError(f"{one.path}: other questions than in {first.path}, though of the same ids")
    rules = [(each.metrics["headline"], each.metrics["protocol"]) for each in (one, first)]
    if rules[0] != rules[1]:
        raise UserError(f"{one.path}: scored by {' of '.join(rules[0])}, {first.path} by {' of '.join(rules[1])}")


def _names(evaluations: list[Artifact]) -> list[str]:
    """A letter and the model's fingerprint."""
    models = [one.record["inputs"].get("model", one.record["content"]["model"]) for one in evaluations]
    return [f"{chr(ord('A') + at)} ({model})" for at, model in enumerate(models)]


def _asked(evaluations: list[Artifact], credits: list[dict[str, float]]) -> list[Asked]:
    said = [{line["question_id"]: line["text"] for line in _lines(one, ANSWERS)} for one in evaluations]
    return [
        Asked(
            line["question_id"],
            line["image"],
            line["text"],
            tuple(line["references"]),
            tuple(texts[line["question_id"]] for texts in said),
            tuple(credit[line["question_id"]] for credit in credits),
        )
        for line in _lines(evaluations[0], QUESTIONS)
    ]


def _lines(artifact: Artifact, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact.path / file).read_bytes().splitlines()]
