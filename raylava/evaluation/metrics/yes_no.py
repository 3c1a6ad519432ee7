"""Yes-or-no questions: POPE (Li et al. 2023) by LLaVA's or lmms-eval's protocol, and custom questions of that kind."""

from collections.abc import Callable, Sequence

import numpy as np

from raylava.evaluation.metrics.score_table import Array, ScoreTable, ratio
from raylava.evaluation.questions import Question

_OUTCOMES = 5  # true yes, false yes, false no, true no, neither


def parse_llava(text: str) -> str:
    """Return `no` if the first sentence, without commas, has one of the words No, no and not; otherwise `yes`."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def parse_lmms_eval(text: str) -> str:
    """Return the whole answer in lower case; only exactly `yes` or `no` can be correct."""
    return text.strip().lower()


PROTOCOLS: dict[str, Callable[[str], str]] = {"llava": parse_llava, "lmms-eval": parse_lmms_eval}


def yes_no_scores(questions: Sequence[Question], texts: Sequence[str | None], protocol: str) -> ScoreTable:
    """Return accuracy, F1, precision, recall and the fraction of `yes` answers.

    The llava protocol computes each metric per category and averages over categories; a missing answer counts as
    a false yes or a false no. The lmms-eval protocol computes metrics over all questions at once; an answer that is
    missing or neither yes nor no is wrong, but counts as neither a false yes nor a false no.
    """
    parse, average_categories = PROTOCOLS[protocol], protocol == "llava"
    categories = sorted({question.category for question in questions})
    outcomes = [
        _outcome(None if text is None else parse(text), question.references[0], allow_neither=not average_categories)
        for question, text in zip(questions, texts, strict=True)
    ]
    counts = np.zeros((len(questions), _OUTCOMES * len(categories)))
    for row, (question, outcome) in enumerate(zip(questions, outcomes, strict=True)):
        counts[row, _OUTCOMES * categories.index(question.category) + outcome] = 1.0

    def compute(sums: Array) -> dict[str, Array]:
        by_category = sums.reshape(*sums.shape[:-1], len(categories), _OUTCOMES)
        if not average_categories:
            return _classification_metrics(by_category.sum(axis=-2))
        has_questions = by_category.sum(axis=-1) > 0
        metrics = _classification_metrics(by_category)
        return {name: _masked_mean(values, has_questions) for name, values in metrics.items()}

    scores = [float(outcome in (0, 3)) for outcome in outcomes]
    return ScoreTable(counts, [question.category for question in questions], compute, scores)


def _outcome(answer: str | None, label: str, allow_neither: bool) -> int:
    """Return the index of the outcome, in the order of `_OUTCOMES`."""
    if answer == label:
        return 0 if label == "yes" else 3
    if allow_neither and answer not in ("yes", "no"):
        return 4
    return 1 if label == "no" else 2


def _classification_metrics(outcomes: Array) -> dict[str, Array]:
    """Return metrics of shape (…) from outcome counts of shape (…, outcomes)."""
    true_yes, false_yes, false_no, true_no = (outcomes[..., column] for column in range(4))
    precision, recall = ratio(true_yes, true_yes + false_yes), ratio(true_yes, true_yes + false_no)
    return {
        "accuracy": ratio(true_yes + true_no, outcomes.sum(axis=-1)),
        "f1": ratio(2 * precision * recall, precision + recall),
        "precision": precision,
        "recall": recall,
        "yes_ratio": ratio(true_yes + false_yes, outcomes.sum(axis=-1)),
    }


def _masked_mean(values: Array, mask: "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]") -> Array:
    return ratio((values * mask).sum(axis=-1), mask.sum(axis=-1).astype(float))
