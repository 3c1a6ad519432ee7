"""Exact match with a reference: the metric of GQA (the official rule as LLaVA applies it) and of custom questions."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from raylava.evaluation.metrics.score_table import Array, ScoreTable, ratio
from raylava.evaluation.questions import Question


def normalize_answer(text: str) -> str:
    """Return the text in lower case, without surrounding whitespace and trailing full stops."""
    return text.strip().rstrip(".").strip().lower()


def is_exact_match(text: str | None, references: Sequence[str]) -> bool:
    """Return whether an answer equals one of the references after normalization; a missing answer (None) does not."""
    return text is not None and normalize_answer(text) in {normalize_answer(reference) for reference in references}


def exact_match(questions: Sequence[Question], texts: Sequence[str | None]) -> ScoreTable:
    """Return the fraction of answers that match a reference exactly."""
    correct = [is_exact_match(text, question.references) for question, text in zip(questions, texts, strict=True)]
    return mean_score("exact_match", correct, questions)


def mean_score(name: str, scores: Sequence[float], questions: Sequence[Question]) -> ScoreTable:
    """Return a table of one metric: the mean of the per-question scores."""
    counts = np.array([[float(score), 1.0] for score in scores])

    def compute(sums: Array) -> dict[str, Array]:
        return {name: ratio(sums[..., 0], sums[..., 1])}

    categories = [question.category for question in questions]
    return ScoreTable(counts, categories, compute, [float(score) for score in scores])


def majority_baseline(questions: Sequence[Question]) -> dict[str, float]:
    """Return the exact match of the best constant answer to each category, by category and over `all` questions."""
    references: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        references[question.category].append(normalize_answer(question.references[0]))
    correct = {category: Counter(texts).most_common(1)[0][1] for category, texts in references.items()}
    by_category = {category: correct[category] / len(texts) for category, texts in references.items()}
    return by_category | {"all": sum(correct.values()) / len(questions)}
