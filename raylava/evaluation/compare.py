"""Comparison of evaluations of the same questions: paired score differences with intervals, and where models differ."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raylava.artifacts import Artifact
from raylava.errors import UserError
from raylava.evaluation.metrics.score_table import paired_interval

# Files of an evaluation artifact.
PER_QUESTION_SCORES = "per_question_scores.json"  # question id → score from 0 to 1
QUESTIONS_FILE = "questions.jsonl"
ANSWERS_FILE = "answers.jsonl"


@dataclass(frozen=True)
class ComparedQuestion:
    """A question with the answers and scores of all evaluations, in the order of the evaluations."""

    question_id: str
    image: str | None
    text: str
    references: tuple[str, ...]
    answers: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def differs(self) -> bool:
        """Whether the evaluations scored differently on this question."""
        return len(set(self.scores)) > 1


@dataclass(frozen=True)
class Difference:
    """The mean score of an evaluation minus that of the first, with the 95 % interval over questions."""

    name: str
    difference: float
    low: float
    high: float

    @property
    def spans_zero(self) -> bool:
        """Whether the interval contains zero."""
        return self.low <= 0.0 <= self.high


@dataclass(frozen=True)
class Comparison:
    """Evaluations of one benchmark: mean scores by name, differences from the first, and all questions.

    `images` is the folder of the benchmark's images.
    """

    benchmark: str
    images: str
    mean_scores: Mapping[str, float]
    differences: Sequence[Difference]
    questions: Sequence[ComparedQuestion]


def compare(evaluations: Sequence[Artifact]) -> list[Comparison]:
    """Group evaluations by benchmark and compare those of each benchmark with its first.

    Raises UserError for an artifact that is not a scored evaluation, a benchmark with a single evaluation, and
    evaluations of a benchmark that differ in their questions, metric or protocol.
    """
    by_benchmark: dict[str, list[Artifact]] = {}
    for evaluation in evaluations:
        if "scores" not in evaluation.metrics:
            raise UserError(f"{evaluation.path}: not a scored evaluation; give folders below STORAGE/evaluate")
        by_benchmark.setdefault(evaluation.metrics["benchmark"], []).append(evaluation)
    for benchmark, group in by_benchmark.items():
        if len(group) < 2:
            raise UserError(f"{group[0].path}: the only evaluation of {benchmark}; give another to compare it with")
    return [_compare_group(benchmark, group) for benchmark, group in by_benchmark.items()]


def _compare_group(benchmark: str, evaluations: list[Artifact]) -> Comparison:
    names = _names(evaluations)
    scores = [json.loads((evaluation.path / PER_QUESTION_SCORES).read_bytes()) for evaluation in evaluations]
    first = scores[0]
    for evaluation, by_id in zip(evaluations, scores, strict=True):
        if by_id.keys() != first.keys():
            unshared = sorted(by_id.keys() ^ first.keys())
            raise UserError(
                f"{evaluation.path}: other questions than in {evaluations[0].path}: {', '.join(unshared[:3])}"
            )
        _check_comparable(evaluation, evaluations[0])
    differences = []
    for name, by_id in list(zip(names, scores, strict=True))[1:]:
        gains = np.array([[by_id[question_id] - first[question_id] for question_id in first]])
        low, high = paired_interval(gains)
        differences.append(Difference(name, float(gains.mean()), low, high))
    mean_scores = {name: float(np.mean(list(by_id.values()))) for name, by_id in zip(names, scores, strict=True)}
    questions = _compared_questions(evaluations, scores)
    return Comparison(benchmark, str(evaluations[0].metrics["images"]), mean_scores, differences, questions)


def _check_comparable(evaluation: Artifact, first: Artifact) -> None:
    """Raise UserError if equal ids denote different questions, or if answers were scored by different metrics."""
    if evaluation.record["fingerprint_fields"]["questions"] != first.record["fingerprint_fields"]["questions"]:
        raise UserError(f"{evaluation.path}: other questions than in {first.path}, although their ids are the same")
    metrics = [f"{each.metrics['headline']} (protocol {each.metrics['protocol']})" for each in (evaluation, first)]
    if metrics[0] != metrics[1]:
        raise UserError(f"{evaluation.path}: scored by {metrics[0]}, but {first.path} by {metrics[1]}")


def _names(evaluations: list[Artifact]) -> list[str]:
    """Name each evaluation by a letter and the fingerprint of its model."""
    models = [each.record["inputs"].get("model", each.record["fingerprint_fields"]["model"]) for each in evaluations]
    return [f"{chr(ord('A') + index)} ({model})" for index, model in enumerate(models)]


def _compared_questions(evaluations: list[Artifact], scores: list[dict[str, float]]) -> list[ComparedQuestion]:
    answers = [
        {line["question_id"]: line["text"] for line in _read_lines(evaluation, ANSWERS_FILE)}
        for evaluation in evaluations
    ]
    return [
        ComparedQuestion(
            line["question_id"],
            line["image"],
            line["text"],
            tuple(line["references"]),
            tuple(texts[line["question_id"]] for texts in answers),
            tuple(by_id[line["question_id"]] for by_id in scores),
        )
        for line in _read_lines(evaluations[0], QUESTIONS_FILE)
    ]


def _read_lines(artifact: Artifact, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact.path / file).read_bytes().splitlines()]
