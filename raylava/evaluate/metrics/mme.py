"""MME (Fu et al. 2023): two questions a image, 100 · accuracy + 100 · accuracy+ for each task, summed.

Perception is ten tasks (at most 2000 points), cognition four (800). accuracy+ counts images of which both answers are
right.
"""

from collections.abc import Sequence

import numpy as np

from raylava.evaluate.metrics.score_table import Array, ScoreTable, share
from raylava.evaluate.questions import Question

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_TASKS = PERCEPTION + COGNITION
_COLUMNS = 4  # answers right, answers, images both right, images


def read(text: str) -> str:
    """yes or no, where it stands in the first four characters, in any case; else other."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def points(questions: Sequence[Question], texts: Sequence[str | None]) -> ScoreTable:
    """Perception, cognition, and each task's points. The unit is a image: questions of one `unit` and category."""
    answered = [
        text is not None and read(text) == question.references[0].lower()
        for question, text in zip(questions, texts, strict=True)
    ]
    right: dict[tuple[str, str], list[bool]] = {}
    for question, own in zip(questions, answered, strict=True):
        right.setdefault((question.category, question.unit), []).append(own)
    counts = np.zeros((len(right), _COLUMNS * len(_TASKS)))
    for row, ((task, _), both) in enumerate(right.items()):
        start = _COLUMNS * _TASKS.index(task)
        counts[row, start : start + _COLUMNS] = sum(both), len(both), all(both), 1.0

    def each_task(sums: Array) -> Array:
        tasks = sums.reshape(*sums.shape[:-1], len(_TASKS), _COLUMNS)
        return 100 * (share(tasks[..., 0], tasks[..., 1]) + share(tasks[..., 2], tasks[..., 3]))

    def figures(sums: Array) -> dict[str, Array]:
        each, cut = each_task(sums), len(PERCEPTION)
        return {"perception": each[..., :cut].sum(axis=-1), "cognition": each[..., cut:].sum(axis=-1)}

    def of_task(sums: Array) -> dict[str, Array]:
        return {"points": each_task(sums).sum(axis=-1)}

    return ScoreTable(counts, [task for task, _ in right], figures, [float(own) for own in answered], of_task)
