"""Answers that are an option's letter: ScienceQA (Lu et al. 2022) by LLaVA's rule, and MMVP (Tong et al. 2024)."""

import re
from collections.abc import Sequence

import numpy as np

from raylava.evaluate.metrics.exact_match import normalise
from raylava.evaluate.metrics.score_table import Array, ScoreTable, share
from raylava.evaluate.questions import Question

_OPTIONS = ("A", "B", "C", "D", "E")
_SAID = re.compile(r"The answer is ([A-Z]).")
_CHOSEN = re.compile(r"\(?([ab])(?:[).:,]|$)")


def letter(text: str) -> str | None:
    """ScienceQA: a letter alone; `X. …`; or `The answer is X.`, once. None for anything else."""
    if text in _OPTIONS:
        return text
    if text[:1] in _OPTIONS and text[1:3] == ". ":
        return text[0]
    found = _SAID.findall(text)
    return found[0] if len(found) == 1 else None


def science_qa(questions: Sequence[Question], texts: Sequence[str | None]) -> ScoreTable:
    """The share of right letters: over questions with images (ScienceQA-img, the headline), and over all."""
    right = [
        text is not None and letter(text.strip()) == question.references[0]
        for question, text in zip(questions, texts, strict=True)
    ]
    shown = [question.image is not None for question in questions]
    counts = np.array([[own and image, image, own, 1.0] for own, image in zip(right, shown, strict=True)], dtype=float)

    def figures(sums: Array) -> dict[str, Array]:
        return {
            "image_accuracy": share(sums[..., 0], sums[..., 1]),
            "accuracy": share(sums[..., 2], sums[..., 3]),
        }

    return ScoreTable(counts, ["image" if image else "text" for image in shown], figures, [float(own) for own in right])


def option(text: str, options: Sequence[str]) -> str | None:
    """MMVP: the very words of an option; or (a), (b), the letter alone or with a mark. None for anything else."""
    said = normalise(text)
    words = {normalise(words): f"({name})" for name, words in zip("ab", options, strict=False)}
    found = _CHOSEN.match(said)
    return words.get(said) or (f"({found[1]})" if found else None)


def mmvp(questions: Sequence[Question], texts: Sequence[str | None]) -> ScoreTable:
    """The share of pairs of which both answers are right (the headline), and of right answers."""
    right = [
        text is not None and option(text, question.references[1:]) == question.references[0]
        for question, text in zip(questions, texts, strict=True)
    ]
    pairs: dict[str, list[bool]] = {}
    for question, own in zip(questions, right, strict=True):
        pairs.setdefault(question.unit, []).append(own)
    counts = np.array([[all(both), 1.0, sum(both), len(both)] for both in pairs.values()], dtype=float)

    def figures(sums: Array) -> dict[str, Array]:
        return {
            "pair_accuracy": share(sums[..., 0], sums[..., 1]),
            "accuracy": share(sums[..., 2], sums[..., 3]),
        }

    return ScoreTable(counts, ["all"] * len(pairs), figures, [float(own) for own in right])
