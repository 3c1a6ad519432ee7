"""MMVP's options are parsed by the official rules."""

import pytest

from raylava.evaluate.benchmarks import mmvp
from raylava.evaluate.metrics.scoring import score_answers
from tests.support.scoring import make_question, metric_values


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
    assert mmvp.parse_option(answer, ["Open", "Closed"]) == parsed


def test_mmvp_prefers_the_words_of_an_option_to_a_letter() -> None:
    assert mmvp.parse_option("A square", ["a circle", "A square"]) == "(b)"


def test_mmvp_scores_pairs_with_both_answers_correct() -> None:
    questions = [make_question(n, ("(a)" if n % 2 else "(b)", "x", "y"), unit=str((n + 1) // 2)) for n in (1, 2, 3, 4)]
    result = score_answers("mmvp", mmvp.BENCHMARK.scoring, questions, {"1": "(a)", "2": "(b)", "3": "(a)", "4": "(a)"})
    assert metric_values(result) == {"pair_accuracy": 0.5, "accuracy": 0.75}
