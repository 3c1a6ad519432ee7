"""MMVP (Tong et al. 2024): pairs of images that CLIP confuses, with the same question of two options.

Two protocols differ in how they read an answer: `letter` takes an option's letter or exact words; `lmms-eval` searches
the text for a letter, and corrects four published labels.
"""

import csv
import io
import re
from collections.abc import Sequence

import numpy as np

from raylava.evaluation.benchmarks.benchmark import OfficialBenchmark
from raylava.evaluation.benchmarks.files import OPTION_LETTER_SUFFIX, append_once, require_file
from raylava.evaluation.metrics.exact_match import normalize_answer
from raylava.evaluation.metrics.score_table import Array, ScoreTable, ratio
from raylava.evaluation.metrics.scoring import Scoring
from raylava.evaluation.questions import Question
from raylava.storage import StoragePath

# A letter at the start, after `answer is` or `option`, or at the end of any word; the first rule that matches decides.
_LMMS_EVAL_RULES = tuple(
    re.compile(rule.format(r"\(?([ab])\)?"))
    for rule in (r"^{}[.\s]", r"answer\s+is\s+{}", r"option\s+{}", r"{}(?:\s|$)")
)
# https://github.com/EvolvingLMMs-Lab/lmms-eval/issues/1018: the published labels of these questions are swapped.
_LMMS_EVAL_LABELS = {"99": "(b)", "100": "(a)", "279": "(b)", "280": "(a)"}
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


def parse_option_lmms_eval(text: str) -> str | None:
    """Return `(a)` or `(b)` by lmms-eval's rules (lmms_eval/tasks/mmvp), which also find letters within sentences."""
    answer = text.strip().lower()
    for rule in _LMMS_EVAL_RULES:
        if match := rule.search(answer):
            return f"({match[1]})"
    return f"({answer[0]})" if answer[:1] in ("a", "b") else None


def mmvp(questions: Sequence[Question], texts: Sequence[str | None]) -> ScoreTable:
    """Return the fraction of pairs with both answers correct (the headline) and the fraction of correct answers."""
    return _pair_scores(
        questions,
        [
            text is not None and parse_option(text, question.references[1:]) == question.references[0]
            for question, text in zip(questions, texts, strict=True)
        ],
    )


def mmvp_lmms_eval(questions: Sequence[Question], texts: Sequence[str | None]) -> ScoreTable:
    """Return the same metrics by lmms-eval's reading of answers and its corrected labels."""
    return _pair_scores(
        questions,
        [
            text is not None
            and parse_option_lmms_eval(text) == _LMMS_EVAL_LABELS.get(question.question_id, question.references[0])
            for question, text in zip(questions, texts, strict=True)
        ],
    )


def _pair_scores(questions: Sequence[Question], correct: Sequence[bool]) -> ScoreTable:
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


BENCHMARK = OfficialBenchmark(
    "mmvp",
    _read,
    Scoring({"letter": mmvp, "lmms-eval": mmvp_lmms_eval}),
    image_folders=("MMVP Images", "images"),
)
