"""Exact match by GQA's rule, and the majority baseline."""

import pytest

from raylava.evaluation.metrics.exact_match import majority_baseline, normalize_answer
from raylava.evaluation.metrics.scoring import EXACT_MATCH, score_answers
from tests.support.scoring import make_question, metric_values


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [("Yes.", "yes"), (" two ", "two"), ("A cat..", "a cat"), ("", ""), ("3.5", "3.5"), ("No .", "no")],
)
def test_case_and_trailing_full_stops_are_ignored(answer: str, normalized: str) -> None:
    assert normalize_answer(answer) == normalized


def test_missing_answer_is_wrong_and_listed() -> None:
    questions = [
        make_question(1, "two", "count"),
        make_question(2, "two", "count"),
        make_question(3, "one", "count"),
        make_question(4, "red", "colour"),
    ]
    result = score_answers("custom", EXACT_MATCH, questions, {"1": "Two.", "2": "one", "4": "red", "3": None})
    assert metric_values(result) == {"exact_match": 0.5}
    assert result.missing == ("3",)
    assert result.by_category["count"] == {"units": 3.0, "exact_match": pytest.approx(1 / 3)}
    assert result.per_question == {"1": 1.0, "2": 0.0, "3": 0.0, "4": 1.0}


def test_majority_baseline_is_the_best_constant_answer_to_each_category() -> None:
    questions = [
        make_question(1, "two", "count"),
        make_question(2, "Two.", "count"),
        make_question(3, "one", "count"),
        make_question(4, "red", "colour"),
    ]
    assert majority_baseline(questions) == {"count": pytest.approx(2 / 3), "colour": 1.0, "all": 0.75}
