"""The rules by name: how a benchmark's answers become a Result."""

from collections.abc import Callable, Mapping, Sequence

from raylava.evaluate.metrics import exact_match, mme, multiple_choice, vqa_accuracy, yes_no
from raylava.evaluate.metrics.mm_vet import mm_vet
from raylava.evaluate.metrics.score_table import Result, ScoreTable
from raylava.evaluate.questions import Question

Grade = Callable[[Sequence[Question], Sequence[str | None]], ScoreTable]


def _vqa(questions: Sequence[Question], texts: Sequence[str | None]) -> ScoreTable:
    asked = zip(questions, texts, strict=True)
    credit = [0.0 if text is None else vqa_accuracy.accuracy(text, question.references) for question, text in asked]
    return exact_match.mean_of("vqa_accuracy", credit, questions)


def _yes_no(protocol: str) -> Grade:
    return lambda questions, texts: yes_no.yes_or_no(questions, texts, protocol)


SCORING_VERSION = 1  # raise it when a rule changes what it says of the same answers

# by rule, the protocols whose letter it follows; the first is the default
RULES: dict[str, dict[str, Grade]] = {
    "exact_match": {"gqa": exact_match.exact_match},
    "vqa_accuracy": {"vqa": _vqa},
    "yes_no": {name: _yes_no(name) for name in yes_no.PROTOCOLS},
    "mme": {"mme": mme.points},
    "science_qa": {"llava": multiple_choice.science_qa},
    "mmvp": {"letter": multiple_choice.mmvp},
}


def judged(benchmark: str, questions: Sequence[Question], grades: Mapping[str, float | None]) -> Result:
    """Score what a judge graded; a question without a grade is missing, and earns nothing."""
    missing = tuple(one.question_id for one in questions if grades.get(one.question_id) is None)
    return _result(benchmark, "judge", questions, missing, mm_vet(questions, grades))


def score(
    benchmark: str, rule: str, questions: Sequence[Question], answers: Mapping[str, str | None], protocol: str = ""
) -> Result:
    """Score `answers` (by question id; None or absent: missing, and wrong) to all of a benchmark's questions."""
    name = protocol or next(iter(RULES[rule]))
    texts = [answers.get(question.question_id) for question in questions]
    tally = RULES[rule][name](questions, texts)
    missing = tuple(one.question_id for one, text in zip(questions, texts, strict=True) if text is None)
    return _result(benchmark, name, questions, missing, tally)


def _result(
    benchmark: str, protocol: str, questions: Sequence[Question], missing: tuple[str, ...], tally: ScoreTable
) -> Result:
    credit = dict(zip((one.question_id for one in questions), tally.credit, strict=True))
    return Result(benchmark, protocol, len(questions), missing, tally.over_all(), tally.by_category(), credit)
