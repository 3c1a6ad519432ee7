"""MME (Fu et al. 2023): two questions per image; a task scores 100 · accuracy + 100 · accuracy+.

Task scores are added up. Perception has ten tasks (at most 2000 points), cognition four (at most 800). accuracy+ is the
fraction of images with both answers correct.
"""

from collections.abc import Sequence

import numpy as np

from raylava.evaluate.metrics.score_table import Array, ScoreTable, ratio
from raylava.evaluate.questions import Question

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_TASKS = PERCEPTION + COGNITION
_COLUMNS = 4  # correct answers, answers, images with both answers correct, images


def parse_yes_no(text: str) -> str:
    """Return `yes` or `no` if the first four characters contain the word in any case, otherwise `other`."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_points(questions: Sequence[Question], texts: Sequence[str | None]) -> ScoreTable:
    """Return the points for perception and cognition, and the points of each task by category.

    A unit is an image: the questions of one `unit` and category.
    """
    correct = [
        text is not None and parse_yes_no(text) == question.references[0].lower()
        for question, text in zip(questions, texts, strict=True)
    ]
    by_image: dict[tuple[str, str], list[bool]] = {}
    for question, is_correct in zip(questions, correct, strict=True):
        by_image.setdefault((question.category, question.unit), []).append(is_correct)
    counts = np.zeros((len(by_image), _COLUMNS * len(_TASKS)))
    for row, ((task, _), pair) in enumerate(by_image.items()):
        start = _COLUMNS * _TASKS.index(task)
        counts[row, start : start + _COLUMNS] = sum(pair), len(pair), all(pair), 1.0
    categories = [task for task, _ in by_image]
    return ScoreTable(counts, categories, _ability_points, [float(is_correct) for is_correct in correct], _task_points)


def _points_by_task(sums: Array) -> Array:
    """Return (…, tasks) points of (…, columns) sums."""
    tasks = sums.reshape(*sums.shape[:-1], len(_TASKS), _COLUMNS)
    return 100 * (ratio(tasks[..., 0], tasks[..., 1]) + ratio(tasks[..., 2], tasks[..., 3]))


def _ability_points(sums: Array) -> dict[str, Array]:
    points, split = _points_by_task(sums), len(PERCEPTION)
    return {"perception": points[..., :split].sum(axis=-1), "cognition": points[..., split:].sum(axis=-1)}


def _task_points(sums: Array) -> dict[str, Array]:
    """Return the points of the only task in the sums; all other tasks have 0 points."""
    return {"points": _points_by_task(sums).sum(axis=-1)}
