"""ScienceQA's letters and MMVP's options are parsed by the official rules."""

import pytest

from raylava.evaluate.metrics.multiple_choice import parse_letter, parse_option
from raylava.evaluate.metrics.registry import score_answers
from raylava.evaluate.questions import Question
from tests.support.scoring import make_question, metric_values


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("B", "B"),
        ("B. the cat", "B"),
        ("The answer is C.", "C"),
        ("I think. The answer is A.", "A"),
        ("The answer is A. The answer is B.", None),
        ("b", None),
        ("B.", None),
        ("(B)", None),
        ("", None),
    ],
)
def test_science_qa_accepts_three_forms_of_a_letter(answer: str, parsed: str | None) -> None:
    assert parse_letter(answer) == parsed


def test_science_qa_scores_questions_with_images_separately() -> None:
    with_image, text_only = make_question(1, "A"), Question("2", None, "text", "text", ("B",))
    result = score_answers("scienceqa", "science_qa", [with_image, text_only], {"1": "A", "2": "C"})
    assert metric_values(result) == {"image_accuracy": 1.0, "accuracy": 0.5}


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("(a)", "(a)"),
        ("A", "(a)"),
        ("b.", "(b)"),
        ("(b) Closed", "(b)"),
        ("Open", "(a)"),
        ("another", None),
        ("", None),
    ],
)
def test_mmvp_accepts_the_letter_or_the_exact_words_of_an_option(answer: str, parsed: str | None) -> None:
    assert parse_option(answer, ["Open", "Closed"]) == parsed


def test_mmvp_prefers_the_words_of_an_option_to_a_letter() -> None:
    assert parse_option("A square", ["a circle", "A square"]) == "(b)"


def test_mmvp_scores_pairs_with_both_answers_correct() -> None:
    questions = [make_question(n, ("(a)" if n % 2 else "(b)", "x", "y"), unit=str((n + 1) // 2)) for n in (1, 2, 3, 4)]
    result = score_answers("mmvp", "mmvp", questions, {"1": "(a)", "2": "(b)", "3": "(a)", "4": "(a)"})
    assert metric_values(result) == {"pair_accuracy": 0.5, "accuracy": 0.75}
