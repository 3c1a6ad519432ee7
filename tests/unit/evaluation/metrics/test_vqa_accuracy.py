"""VQA accuracy matches the official evaluation, including its quirks."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylava.evaluation.metrics.vqa_accuracy import accuracy, normalize_answer


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("The dog", "dog"),
        ("an apple", "apple"),
        ("two", "2"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("yes, sir", "yes sir"),
        ("red/blue", "red blue"),
        ("red /blue", "red blue"),
        ("1,000", "1000"),
        ("1,000 a-b", "1000 ab"),
        ("St. Louis", "st louis"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("what?!", "what"),
        ("Im", "im"),
        ("somebody'd", "somebodyd"),
    ],
)
def test_answers_are_normalized_as_in_the_official_evaluation(answer: str, normalized: str) -> None:
    assert normalize_answer(answer) == normalized


def test_each_reference_is_left_out_in_turn() -> None:
    references = ["cat"] * 3 + ["dog"] * 7
    assert accuracy("Cat", references) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert accuracy("the dog", references) == 1.0
    assert accuracy("bird", references) == 0.0
    assert accuracy("one cat", ["1 cat", *["x"] * 9]) == pytest.approx(0.9 / 3)


def test_nothing_is_normalized_if_all_references_are_identical() -> None:
    assert accuracy("the cat", ["cat"] * 10) == 0.0
    assert accuracy("cat ", ["cat"] * 10) == 1.0


WORDS = st.text(alphabet=string.ascii_letters + string.digits + " ,.'-/!?", max_size=20)


@given(WORDS, st.lists(WORDS, min_size=10, max_size=10))
def test_accuracy_is_between_0_and_1_and_grows_with_agreement(answer: str, references: list[str]) -> None:
    score = accuracy(answer, references)
    assert 0.0 <= score <= 1.0
    assert accuracy(answer, [*references, answer]) >= score - 1e-9 or len(set(references)) == 1
