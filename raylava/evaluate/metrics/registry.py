"""Metrics by name, and the functions that turn the answers to a benchmark into a BenchmarkResult."""

from collections.abc import Callable, Mapping, Sequence

from raylava.evaluate.metrics import exact_match, mme, multiple_choice, vqa_accuracy, yes_no
from raylava.evaluate.metrics.mm_vet import mm_vet
from raylava.evaluate.metrics.score_table import BenchmarkResult, ScoreTable
from raylava.evaluate.questions import Question

MetricFunction = Callable[[Sequence[Question], Sequence[str | None]], ScoreTable]

SCORING_VERSION = 1  # increment when a metric scores the same answers differently


def _vqa_accuracy(questions: Sequence[Question], texts: Sequence[str | None]) -> ScoreTable:
    scores = [
        0.0 if text is None else vqa_accuracy.accuracy(text, question.references)
        for question, text in zip(questions, texts, strict=True)
    ]
    return exact_match.mean_score("vqa_accuracy", scores, questions)


def _yes_no(protocol: str) -> MetricFunction:
    return lambda questions, texts: yes_no.yes_no_scores(questions, texts, protocol)


# metric → scoring protocol → function; the first protocol is the default
METRICS: dict[str, dict[str, MetricFunction]] = {
    "exact_match": {"gqa": exact_match.exact_match},
    "vqa_accuracy": {"vqa": _vqa_accuracy},
    "yes_no": {name: _yes_no(name) for name in yes_no.PROTOCOLS},
    "mme": {"mme": mme.mme_points},
    "science_qa": {"llava": multiple_choice.science_qa},
    "mmvp": {"letter": multiple_choice.mmvp},
}


def score_grades(benchmark: str, questions: Sequence[Question], grades: Mapping[str, float | None]) -> BenchmarkResult:
    """Score a judge's grades by question id; a question without a grade is missing and scores 0."""
    missing = tuple(question.question_id for question in questions if grades.get(question.question_id) is None)
    return _result(benchmark, "judge", questions, missing, mm_vet(questions, grades))


def score_answers(
    benchmark: str, metric: str, questions: Sequence[Question], answers: Mapping[str, str | None], protocol: str = ""
) -> BenchmarkResult:
    """Score answers by question id to all questions of a benchmark; an absent answer or None is missing and wrong."""
    name = protocol or next(iter(METRICS[metric]))
    texts = [answers.get(question.question_id) for question in questions]
    table = METRICS[metric][name](questions, texts)
    missing = tuple(question.question_id for question, text in zip(questions, texts, strict=True) if text is None)
    return _result(benchmark, name, questions, missing, table)


def _result(
    benchmark: str, protocol: str, questions: Sequence[Question], missing: tuple[str, ...], table: ScoreTable
) -> BenchmarkResult:
    ids = [question.question_id for question in questions]
    per_question = dict(zip(ids, table.per_question_scores, strict=True))
    return BenchmarkResult(
        benchmark, protocol, len(questions), missing, table.overall(), table.by_category(), per_question
    )
