"""Answers that must equal a reference: GQA's rule (the official one, as LLaVA applies it), and one's own questions."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from raylava.evaluate.metrics.score_table import Array, ScoreTable, share
from raylava.evaluate.questions import Question


def normalise(text: str) -> str:
    """Full stops at the end dropped, lower case, spaces trimmed."""
    return text.strip().rstrip(".").strip().lower()


def matches(text: str | None, references: Sequence[str]) -> bool:
    """Whether an answer equals one of the references; no answer (None) does not."""
    return text is not None and normalise(text) in {normalise(reference) for reference in references}


def exact_match(questions: Sequence[Question], texts: Sequence[str | None]) -> ScoreTable:
    """The share of answers that match exactly."""
    right = [matches(text, question.references) for question, text in zip(questions, texts, strict=True)]
    return mean_of("exact_match", right, questions)


def mean_of(name: str, credit: Sequence[float], questions: Sequence[Question]) -> ScoreTable:
    """A figure that is the mean credit of questions."""
    counts = np.array([[float(one), 1.0] for one in credit])

    def figures(sums: Array) -> dict[str, Array]:
        return {name: share(sums[..., 0], sums[..., 1])}

    return ScoreTable(counts, [question.category for question in questions], figures, [float(one) for one in credit])


def majority(questions: Sequence[Question]) -> dict[str, float]:
    """By category, and over `all`, the share that the best constant answer to each category would match."""
    by_category: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        by_category[question.category].append(normalise(question.references[0]))
    right = {name: Counter(own).most_common(1)[0][1] for name, own in by_category.items()}
    found = {name: right[name] / len(own) for name, own in by_category.items()}
    return found | {"all": sum(right.values()) / len(questions)}
