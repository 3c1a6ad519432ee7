"""How answers become scores: the metrics of custom benchmarks, and the functions that compute a BenchmarkResult."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from raylava.evaluation.metrics import exact_match, vqa_accuracy, yes_no
from raylava.evaluation.metrics.score_table import BenchmarkResult, ScoreTable
from raylava.evaluation.questions import Question

MetricFunction = Callable[[Sequence[Question], Sequence[str | None]], ScoreTable]
GradesFunction = Callable[[Sequence[Question], Mapping[str, float | None]], ScoreTable]

SCORING_VERSION = 1  # increment when a metric scores the same answers differently


@dataclass(frozen=True)
class Scoring:
    """How a benchmark's answers are scored.

    `protocols` maps the names of scoring protocols (toolkits whose rules differ) to metrics of the answers' text; the
    first is the default. `grades` computes scores from a judge's grades instead. With `has_constant_answer`, the best
    constant answer to each category is reported as a baseline.
    """

    protocols: Mapping[str, MetricFunction] = field(default_factory=dict)
    grades: GradesFunction | None = None
    has_constant_answer: bool = False

    @property
    def is_judged(self) -> bool:
        """Whether a judge grades the answers."""
        return self.grades is not None


def _vqa_accuracy(questions: Sequence[Question], texts: Sequence[str | None]) -> ScoreTable:
    scores = [
        0.0 if text is None else vqa_accuracy.accuracy(text, question.references)
        for question, text in zip(questions, texts, strict=True)
    ]
    return exact_match.mean_score("vqa_accuracy", scores, questions)


def _yes_no(protocol: str) -> MetricFunction:
    return lambda questions, texts: yes_no.yes_no_scores(questions, texts, protocol)


# metric → scoring protocol → function; the first protocol is the default


EXACT_MATCH = Scoring({"gqa": exact_match.exact_match}, has_constant_answer=True)
VQA_ACCURACY = Scoring({"vqa": _vqa_accuracy})
YES_NO = Scoring({name: _yes_no(name) for name in yes_no.PROTOCOLS}, has_constant_answer=True)
CUSTOM_METRICS = {"exact_match": EXACT_MATCH, "vqa_accuracy": VQA_ACCURACY, "yes_no": YES_NO}


def score_grades(
    benchmark: str, scoring: Scoring, questions: Sequence[Question], grades: Mapping[str, float | None]
) -> BenchmarkResult:
    """Score a judge's grades by question id; a question without a grade is missing and scores 0."""
    assert scoring.grades is not None
    missing = tuple(question.question_id for question in questions if grades.get(question.question_id) is None)
    return _result(benchmark, "judge", questions, missing, scoring.grades(questions, grades))


def score_answers(
    benchmark: str,
    scoring: Scoring,
    questions: Sequence[Question],
    answers: Mapping[str, str | None],
    protocol: str = "",
) -> BenchmarkResult:
    """Score answers by question id to all questions of a benchmark; an absent answer or None is missing and wrong."""
    name = protocol or next(iter(scoring.protocols))
    texts = [answers.get(question.question_id) for question in questions]
    table = scoring.protocols[name](questions, texts)
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
