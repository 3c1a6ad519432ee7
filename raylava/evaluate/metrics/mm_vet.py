"""MM-Vet (Yu et al. 2023): answers that a judge, somebody else's program, graded from 0 to 1; by capability."""

from collections.abc import Mapping, Sequence

import numpy as np

from raylava.errors import UserError
from raylava.evaluate.metrics.score_table import Array, ScoreTable, share
from raylava.evaluate.questions import Question

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


def mm_vet(questions: Sequence[Question], grades: Mapping[str, float | None]) -> ScoreTable:
    """100 times the mean grade: over all, and of the questions that want each capability (a question may want several).

    A question's category is its capabilities, comma-separated. Raises UserError for a grade outside 0 to 1.
    """
    credit = [_grade(question, grades.get(question.question_id)) for question in questions]
    counts = np.zeros((len(questions), 2 + 2 * len(CAPABILITIES)))
    for row, (question, grade) in enumerate(zip(questions, credit, strict=True)):
        wanted = [True] + [name in question.category.split(",") for name in CAPABILITIES]
        counts[row, 0::2] = [grade * one for one in wanted]
        counts[row, 1::2] = wanted

    def figures(sums: Array) -> dict[str, Array]:
        names = ("total", *CAPABILITIES)
        return {name: 100 * share(sums[..., 2 * at], sums[..., 2 * at + 1]) for at, name in enumerate(names)}

    return ScoreTable(counts, ["all"] * len(questions), figures, credit)


def _grade(question: Question, grade: float | None) -> float:
    if grade is None:
        return 0.0
    if not 0 <= grade <= 1:
        raise UserError(f"{question.question_id}: the judge gave {grade}; a grade lies between 0 and 1")
    return float(grade)
