"""A counting benchmark: the fraction of answers that are at most one off."""

import json
from collections.abc import Sequence

from raylava.evaluation.benchmarks.benchmark import OfficialBenchmark
from raylava.evaluation.benchmarks.files import require_file, short_answer
from raylava.evaluation.metrics.exact_match import mean_score
from raylava.evaluation.metrics.score_table import ScoreTable
from raylava.evaluation.metrics.scoring import Scoring
from raylava.evaluation.questions import Question
from raylava.storage import StoragePath


def _read(data: StoragePath) -> list[Question]:
    entries = json.loads(require_file(data, "counts.json").read_bytes())
    return [
        Question(str(entry["id"]), entry["image"], short_answer(entry["question"]), "all", (str(entry["count"]),))
        for entry in entries
    ]


def within_one(questions: Sequence[Question], texts: Sequence[str | None]) -> ScoreTable:
    """Return the fraction of answers that are numbers and at most one off."""
    scores = [
        float(text is not None and text.strip().isdigit() and abs(int(text) - int(question.references[0])) <= 1)
        for question, text in zip(questions, texts, strict=True)
    ]
    return mean_score("within_one", scores, questions)


BENCHMARK = OfficialBenchmark("counting", _read, Scoring({"within-one": within_one}), image_folders=("images",))
