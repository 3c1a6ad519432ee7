"""Yes or no: POPE (Li et al. 2023) by LLaVA's rule or lmms-eval's, and one's own questions of that kind."""

from collections.abc import Callable, Sequence

import numpy as np

from raylava.evaluate.metrics.score_table import Array, ScoreTable, share
from raylava.evaluate.questions import Question

_OUTCOMES = 5  # true and false yes, false and true no, neither


def llava(text: str) -> str:
    """`no` when the first sentence, commas dropped, has one of the words No, no, not; all else is `yes`."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def lmms_eval(text: str) -> str:
    """The answer must be the very word, in any case; all else is neither."""
    return text.strip().lower()


PROTOCOLS: dict[str, Callable[[str], str]] = {"llava": llava, "lmms-eval": lmms_eval}


def yes_or_no(questions: Sequence[Question], texts: Sequence[str | None], protocol: str) -> ScoreTable:
    """Accuracy, F1, precision, recall and the share of yes.

    By llava, of each category, then their mean; an answer that is missing is wrong whatever the label. By lmms-eval,
    over all questions at once; one that is missing or neither is wrong, but no false yes or no.
    """
    read, by_category = PROTOCOLS[protocol], protocol == "llava"
    categories = sorted({question.category for question in questions})
    outcomes = [
        _outcome(None if text is None else read(text), question.references[0], neither=not by_category)
        for question, text in zip(questions, texts, strict=True)
    ]
    counts = np.zeros((len(questions), _OUTCOMES * len(categories)))
    for row, (question, outcome) in enumerate(zip(questions, outcomes, strict=True)):
        counts[row, _OUTCOMES * categories.index(question.category) + outcome] = 1.0

    def figures(sums: Array) -> dict[str, Array]:
        own = sums.reshape(*sums.shape[:-1], len(categories), _OUTCOMES)
        if not by_category:
            return _figures(own.sum(axis=-2))
        return {name: _mean(values, own.sum(axis=-1) > 0) for name, values in _figures(own).items()}

    credit = [float(outcome in (0, 3)) for outcome in outcomes]
    return ScoreTable(counts, [question.category for question in questions], figures, credit)


def _outcome(said: str | None, label: str, neither: bool) -> int:
    if said == label:
        return 0 if label == "yes" else 3
    if neither and said not in ("yes", "no"):
        return 4
    return 1 if label == "no" else 2


def _figures(own: Array) -> dict[str, Array]:
    """(…, outcomes) → (…) each."""
    true_yes, false_yes, false_no, true_no = (own[..., column] for column in range(4))
    precision, recall = share(true_yes, true_yes + false_yes), share(true_yes, true_yes + false_no)
    return {
        "accuracy": share(true_yes + true_no, own.sum(axis=-1)),
        "f1": share(2 * precision * recall, precision + recall),
        "precision": precision,
        "recall": recall,
        "yes_ratio": share(true_yes + false_yes, own.sum(axis=-1)),
    }


def _mean(values: Array, there: "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]") -> Array:
    return share((values * there).sum(axis=-1), there.sum(axis=-1).astype(float))
