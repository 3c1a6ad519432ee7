"""MMVP (Tong et al. 2024): pairs of images that CLIP confuses, with the same question of two options."""

import csv
import io
import re
from collections.abc import Sequence

import numpy as np

from raylava.evaluate.benchmarks.benchmark import OfficialBenchmark
from raylava.evaluate.benchmarks.files import OPTION_LETTER_SUFFIX, append_once, require_file
from raylava.evaluate.metrics.exact_match import normalize_answer
from raylava.evaluate.metrics.score_table import Array, ScoreTable, ratio
from raylava.evaluate.metrics.scoring import Scoring
from raylava.evaluate.questions import Question
from raylava.storage import StoragePath

_LETTER = re.compile(r"\(?([ab])(?:[).:,]|$)")


def _read(data: StoragePath) -> list[Question]:
    file = require_file(data, "Questions.csv")
    questions = []
    for row in csv.DictReader(io.StringIO(file.read_bytes().decode("utf-8-sig"))):
        number = int(row["Index"] if "Index" in row else row["lndex"])  # the published header is misspelled
        options = [option.strip() for option in re.split(r"\([ab]\)", row["Options"])[1:]]
        text = append_once(f"{row['Question']} {row['Options']}", OPTION_LETTER_SUFFIX)
        label = row["Correct Answer"].strip().lower()
        pair = str((number - 1) // 2 + 1)
        questions.append(Question(str(number), f"{number}.jpg", text, "all", (label, *options), unit=pair))
    return questions


def parse_option(text: str, options: Sequence[str]) -> str | None:
    """Return MMVP's `(a)` or `(b)` from an option's exact words or its letter; None for any other text.

    A letter is accepted alone, in parentheses, or followed by a punctuation mark.
    """
    answer = normalize_answer(text)
    by_words = {normalize_answer(words): f"({name})" for name, words in zip("ab", options, strict=False)}
    match = _LETTER.match(answer)
    return by_words.get(answer) or (f"({match[1]})" if match else None)


def mmvp(questions: Sequence[Question], texts: Sequence[str | None]) -> ScoreTable:
    """Return the fraction of pairs with both answers correct (the headline) and the fraction of correct answers."""
    correct = [
        text is not None and parse_option(text, question.references[1:]) == question.references[0]
        for question, text in zip(questions, texts, strict=True)
    ]
    pairs: dict[str, list[bool]] = {}
    for question, right in zip(questions, correct, strict=True):
        pairs.setdefault(question.unit, []).append(right)
    counts = np.array([[all(pair), 1.0, sum(pair), len(pair)] for pair in pairs.values()], dtype=float)

    def compute(sums: Array) -> dict[str, Array]:
        return {
            "pair_accuracy": ratio(sums[..., 0], sums[..., 1]),
            "accuracy": ratio(sums[..., 2], sums[..., 3]),
        }

    return ScoreTable(counts, ["all"] * len(pairs), compute, [float(right) for right in correct])


BENCHMARK = OfficialBenchmark("mmvp", _read, Scoring({"letter": mmvp}), image_folders=("MMVP Images", "images"))
