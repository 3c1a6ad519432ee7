"""Answers and references → scores. Pure functions; how answers came to be is answer.py's business."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from raylava.evaluate.questions import Question


@dataclass(frozen=True)
class Score:
    """Exact match over `questions` questions. `majority`: by the best constant answer a category."""

    questions: int
    missing: int
    exact_match: float
    majority: float


@dataclass(frozen=True)
class Scores:
    """A benchmark's result: over all questions, and by category."""

    overall: Score
    by_category: dict[str, Score]


def normalise(text: str) -> str:
    """GQA's rule (LLaVA): a trailing full stop dropped, lower case, spaces trimmed."""
    return text.strip().removesuffix(".").strip().lower()


def exact_match(questions: Sequence[Question], texts: Sequence[str | None]) -> Scores:
    """Score answers given in the questions' order; None (no answer) counts as wrong and as missing."""
    by_category: dict[str, list[tuple[str | None, str]]] = defaultdict(list)
    for question, text in zip(questions, texts, strict=True):
        by_category[question.category].append((text, question.reference))
    scores = {category: _score(pairs) for category, pairs in sorted(by_category.items())}
    total = sum(score.questions for score in scores.values())
    overall = Score(
        questions=total,
        missing=sum(score.missing for score in scores.values()),
        exact_match=sum(score.exact_match * score.questions for score in scores.values()) / total,
        majority=sum(score.majority * score.questions for score in scores.values()) / total,
    )
    return Scores(overall, scores)


def matches(text: str | None, reference: str) -> bool:
    """Whether an answer is right by exact match; no answer (None) is not."""
    return text is not None and normalise(text) == normalise(reference)


def _score(pairs: list[tuple[str | None, str]]) -> Score:
    right = sum(matches(text, reference) for text, reference in pairs)
    commonest = Counter(normalise(reference) for _, reference in pairs).most_common(1)[0][1]
    missing = sum(text is None for text, _ in pairs)
    return Score(len(pairs), missing, right / len(pairs), commonest / len(pairs))
