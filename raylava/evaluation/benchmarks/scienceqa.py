"""ScienceQA (Lu et al. 2022): multiple choice, by LLaVA's conversations of the test split and its parsing rule."""

import re
from collections.abc import Sequence

import numpy as np

from raylava.errors import UserError
from raylava.evaluation.benchmarks.benchmark import OfficialBenchmark
from raylava.evaluation.benchmarks.files import OPTION_LETTER_SUFFIX, append_once, read_json, require_file
from raylava.evaluation.metrics.score_table import Array, ScoreTable, ratio
from raylava.evaluation.metrics.scoring import Scoring
from raylava.evaluation.questions import Question
from raylava.models.templates import IMAGE_TOKEN
from raylava.storage import StoragePath

_LETTERS = ("A", "B", "C", "D", "E")
_LETTER_IN_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def _read(data: StoragePath) -> list[Question]:
    """Read LLaVA's conversations of the test split; the label is the letter in the answer's turn."""
    file = require_file(data, "llava_test_CQM-A.json", "questions.json")
    questions = []
    for entry in read_json(file):
        human, answer = (turn["value"] for turn in entry["conversations"][:2])
        label = parse_letter(answer.strip())
        if label is None:
            raise UserError(f"{file}: question {entry['id']} has the answer {answer!r}, which contains no letter")
        text = append_once(human.replace(IMAGE_TOKEN, "").strip(), OPTION_LETTER_SUFFIX)
        category = "image" if "image" in entry else "text"
        questions.append(Question(str(entry["id"]), entry.get("image"), text, category, (label,)))
    return questions


def parse_letter(text: str) -> str | None:
    """Return ScienceQA's letter from `X`, `X. …`, or a single `The answer is X.`; None for any other text."""
    if text in _LETTERS:
        return text
    if text[:1] in _LETTERS and text[1:3] == ". ":
        return text[0]
    letters = _LETTER_IN_SENTENCE.findall(text)
    return letters[0] if len(letters) == 1 else None


def science_qa(questions: Sequence[Question], texts: Sequence[str | None]) -> ScoreTable:
    """Return the fraction of correct letters: over questions with images (ScienceQA-IMG, the headline) and over all."""
    correct = [
        text is not None and parse_letter(text.strip()) == question.references[0]
        for question, text in zip(questions, texts, strict=True)
    ]
    has_image = [question.image is not None for question in questions]
    counts = np.array(
        [[right and image, image, right, 1.0] for right, image in zip(correct, has_image, strict=True)], dtype=float
    )

    def compute(sums: Array) -> dict[str, Array]:
        """Return the metrics; without questions with images, their accuracy is undefined and left out."""
        image_accuracy = {"image_accuracy": ratio(sums[..., 0], sums[..., 1])} if sums[..., 1].any() else {}
        return image_accuracy | {"accuracy": ratio(sums[..., 2], sums[..., 3])}

    categories = ["image" if image else "text" for image in has_image]
    return ScoreTable(counts, categories, compute, [float(right) for right in correct])


BENCHMARK = OfficialBenchmark(
    "scienceqa", _read, Scoring({"llava": science_qa}), image_folders=("images/test", "test", "images")
)
