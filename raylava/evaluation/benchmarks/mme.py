"""MME (Fu et al. 2023): two questions per image; a task scores 100 · accuracy + 100 · accuracy+.

Task scores are added up. Perception has ten tasks (at most 2000 points), cognition four (at most 800). accuracy+ is the
fraction of images with both answers correct.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from raylava.errors import UserError
from raylava.evaluation.benchmarks.benchmark import OfficialBenchmark
from raylava.evaluation.benchmarks.files import short_answer
from raylava.evaluation.metrics.score_table import Array, ScoreTable, ratio
from raylava.evaluation.metrics.scoring import Scoring
from raylava.evaluation.questions import Question
from raylava.storage import StoragePath

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


def _read(data: StoragePath) -> list[Question]:
    """Read the folder of each task: one text file per image, with two lines of question and label."""
    questions: list[Question] = []
    for task in (*PERCEPTION, *COGNITION):
        texts, images = data / task / "questions_answers_YN", data / task / "images"
        if not texts.is_folder():
            texts = images = data / task
        if not texts.children():
            raise UserError(f"{data}: MME's task {task} is missing; give the folder of the whole release as --data")
        questions += _read_task(task, texts, images)
    return questions


def _read_task(task: str, texts: StoragePath, images: StoragePath) -> Iterator[Question]:
    by_stem = {file.name.rpartition(".")[0]: file.name for file in images.children() if not file.name.endswith(".txt")}
    for file in texts.children():
        stem, _, extension = file.name.rpartition(".")
        if extension != "txt":
            continue
        if stem not in by_stem:
            raise UserError(f"{file}: its image is not in {images}")
        image = f"{task}/images/{by_stem[stem]}" if images.name == "images" else f"{task}/{by_stem[stem]}"
        yield from _read_pair(file, task, f"{task}/{stem}", image)


def _read_pair(file: StoragePath, task: str, unit: str, image: str) -> Iterator[Question]:
    lines = [line for line in file.read_bytes().decode("utf-8").splitlines() if line.strip()]
    if len(lines) != 2:
        raise UserError(f"{file}: {len(lines)} questions; MME has two for each image")
    for index, line in enumerate(lines):
        text, _, label = line.rpartition("\t")
        reference = label.strip().lower()
        if reference not in ("yes", "no"):
            raise UserError(f"{file}: the label {label!r} is neither yes nor no")
        text = short_answer(text.replace("Please answer yes or no.", "").strip())
        yield Question(f"{image}#{index}", image, text, task, (reference,), unit=unit)


BENCHMARK = OfficialBenchmark("mme", _read, Scoring({"mme": mme_points}))
