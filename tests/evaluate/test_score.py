"""Exact match by question type, with missing answers counted, and the best constant answer beside it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylava.evaluate.questions import Question
from raylava.evaluate.score import Score, exact_match, normalise


def asked(category: str, reference: str) -> Question:
    return Question("id", None, "text", category, reference)


@pytest.mark.parametrize(
    ("said", "normal"),
    [("Yes.", "yes"), (" two ", "two"), ("A cat..", "a cat."), ("", ""), ("3.5", "3.5"), ("No .", "no")],
)
def test_answers_are_compared_without_case_and_final_stop(said: str, normal: str) -> None:
    assert normalise(said) == normal


def test_scores_by_category_and_over_all() -> None:
    questions = [asked("count", "two"), asked("count", "two"), asked("count", "one"), asked("colour", "red")]
    scores = exact_match(questions, ["Two.", "one", None, "red"])
    assert scores.by_category["count"] == Score(questions=3, missing=1, exact_match=1 / 3, majority=2 / 3)
    assert scores.by_category["colour"] == Score(questions=1, missing=0, exact_match=1.0, majority=1.0)
    assert scores.overall == Score(questions=4, missing=1, exact_match=0.5, majority=0.75)


ANSWERS = st.sampled_from(["yes", "no", "two"])


@given(st.lists(st.tuples(st.sampled_from("ab"), ANSWERS, ANSWERS | st.none()), min_size=1))
def test_the_overall_score_is_the_share_of_right_answers(rows: list[tuple[str, str, str | None]]) -> None:
    scores = exact_match([asked(category, reference) for category, reference, _ in rows], [said for *_, said in rows])
    right = sum(reference == said for _, reference, said in rows)
    assert scores.overall.exact_match == pytest.approx(right / len(rows))
    assert scores.overall.questions == len(rows) == sum(score.questions for score in scores.by_category.values())


def test_answers_must_pair_with_questions() -> None:
    with pytest.raises(ValueError, match="shorter"):
        exact_match([asked("a", "x"), asked("a", "x")], ["x"])
