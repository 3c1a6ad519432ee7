"""MM-Vet (Yu et al. 2023): the mean grade of a judge, over all questions and by capability."""

from collections.abc import Mapping, Sequence

import numpy as np

from raylava.errors import UserError
from raylava.evaluation.benchmarks.benchmark import OfficialBenchmark
from raylava.evaluation.benchmarks.files import read_json, require_file
from raylava.evaluation.metrics.score_table import Array, ScoreTable, ratio
from raylava.evaluation.metrics.scoring import Scoring
from raylava.evaluation.questions import Question
from raylava.storage import StoragePath

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


def _read(data: StoragePath) -> list[Question]:
    entries = read_json(require_file(data, "mm-vet.json"))
    return [
        Question(question_id, entry["imagename"], entry["question"], ",".join(entry["capability"]), (entry["answer"],))
        for question_id, entry in entries.items()
    ]


BENCHMARK = OfficialBenchmark("mm-vet", _read, Scoring(grades=mm_vet), image_folders=("images",), max_new_tokens=512)
