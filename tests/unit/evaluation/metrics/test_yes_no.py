"""POPE by the protocols of LLaVA and lmms-eval."""

import pytest

from raylava.evaluation.metrics.scoring import YES_NO, score_answers
from raylava.evaluation.metrics.yes_no import parse_llava
from tests.support.scoring import make_question, metric_values


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("No", "no"),
        ("no, there is none", "no"),
        ("There is not a dog", "no"),
        ("Yes, there is no doubt", "no"),
        ("Yes. There is no cat", "yes"),
        ("NO", "yes"),
        ("nothing", "yes"),
        ("maybe", "yes"),
        ("", "yes"),
        ("No,", "no"),
    ],
)
def test_llava_parses_no_from_a_negation_in_the_first_sentence(answer: str, parsed: str) -> None:
    assert parse_llava(answer) == parsed


def test_lmms_eval_accepts_only_the_exact_word() -> None:
    questions = [make_question(1, "yes"), make_question(2, "no"), make_question(3, "yes")]
    answers = {"1": "maybe", "2": "No there is none", "3": " YES "}
    assert metric_values(score_answers("pope", YES_NO, questions, answers, "llava"))["accuracy"] == 1.0
    result = score_answers("pope", YES_NO, questions, answers, "lmms-eval")
    assert (result.protocol, metric_values(result)["accuracy"]) == ("lmms-eval", pytest.approx(1 / 3))


def test_lmms_eval_counts_other_answers_as_wrong_but_not_as_false_yes() -> None:
    questions = [
        make_question(1, "yes"),
        make_question(2, "no", "b"),
        make_question(3, "yes", "b"),
        make_question(4, "no"),
    ]
    answers = {"1": "Yes", "2": "unclear", "3": "unclear", "4": "unclear"}
    values = metric_values(score_answers("pope", YES_NO, questions, answers, "lmms-eval"))
    assert values == {"accuracy": 0.25, "f1": 1.0, "precision": 1.0, "recall": 1.0, "yes_ratio": 0.25}


def test_llava_averages_over_categories_regardless_of_their_size() -> None:
    questions = [
        make_question(1, "yes", "a"),
        make_question(2, "no", "a"),
        make_question(3, "yes", "a"),
        make_question(4, "no", "b"),
    ]
    result = score_answers("pope", YES_NO, questions, {"1": "yes", "2": "yes", "3": "no", "4": "no"})
    scores = result.by_category["a"]
    assert (scores["accuracy"], scores["precision"], scores["recall"], scores["f1"]) == pytest.approx(
        (1 / 3, 0.5, 0.5, 0.5)
    )
    assert scores["yes_ratio"] == pytest.approx(2 / 3)
    assert metric_values(result)["accuracy"] == pytest.approx((1 / 3 + 1) / 2)
