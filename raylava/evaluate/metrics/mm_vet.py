"""MM-Vet (Yu et al. 2023): the mean grade of a judge, over all questions and by capability.

It has a module to itself because it is the only metric computed from grades and not from the text of the answers.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from raylava.errors import UserError
from raylava.evaluate.metrics.score_table import Array, ScoreTable, ratio
from raylava.evaluate.questions import Question

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


def mm_vet(questions: Sequence[Question], grades: Mapping[str, float | None]) -> ScoreTable:
    """Return 100 times the mean grade, over all questions and over those that require each capability.

    The category of a question is its comma-separated list of capabilities. A question without a grade scores 0. Raises
    UserError for a grade outside 0 to 1.
    """
    scores = [_checked_grade(question, grades.get(question.question_id)) for question in questions]
    counts = np.zeros((len(questions), 2 + 2 * len(CAPABILITIES)))
    for row, (question, score) in enumerate(zip(questions, scores, strict=True)):
        required = question.category.split(",")
        applies = [True] + [capability in required for capability in CAPABILITIES]
        counts[row, 0::2] = [score * applicable for applicable in applies]
        counts[row, 1::2] = applies

    def compute(sums: Array) -> dict[str, Array]:
        names = ("total", *CAPABILITIES)
        return {name: 100 * ratio(sums[..., 2 * index], sums[..., 2 * index + 1]) for index, name in enumerate(names)}

    return ScoreTable(counts, ["all"] * len(questions), compute, scores)


def _checked_grade(question: Question, grade: float | None) -> float:
    if grade is None:
        return 0.0
    if not 0 <= grade <= 1:
        raise UserError(f"{question.question_id}: the judge's grade is {grade}; a grade must lie between 0 and 1")
    return float(grade)
