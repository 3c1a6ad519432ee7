"""Multiple choice: ScienceQA (Lu et al. 2022) by LLaVA's parsing rule, and MMVP (Tong et al. 2024)."""

import re
from collections.abc import Sequence

import numpy as np

from raylava.evaluate.metrics.exact_match import normalize_answer
from raylava.evaluate.metrics.score_table import Array, ScoreTable, ratio
from raylava.evaluate.questions import Question

_LETTERS = ("A", "B", "C", "D", "E")
_LETTER_IN_SENTENCE = re.compile(r"The answer is ([A-Z]).")
_MMVP_LETTER = re.compile(r"\(?([ab])(?:[).:,]|$)")


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
        return {
            "image_accuracy": ratio(sums[..., 0], sums[..., 1]),
            "accuracy": ratio(sums[..., 2], sums[..., 3]),
        }

    categories = ["image" if image else "text" for image in has_image]
    return ScoreTable(counts, categories, compute, [float(right) for right in correct])


def parse_option(text: str, options: Sequence[str]) -> str | None:
    """Return MMVP's `(a)` or `(b)` from an option's exact words or its letter; None for any other text.

    A letter is accepted alone, in parentheses, or followed by a punctuation mark.
    """
    answer = normalize_answer(text)
    by_words = {normalize_answer(words): f"({name})" for name, words in zip("ab", options, strict=False)}
    match = _MMVP_LETTER.match(answer)
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
