"""MMVP's options are parsed by the official rules."""

import pytest

from raylava.evaluation.benchmarks import mmvp
from raylava.evaluation.metrics.scoring import score_answers
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


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("(a)", "(a)"),
        ("B.", "(b)"),
        ("A long tusk", "(a)"),
        ("The answer is (b), clearly", "(b)"),
        ("I choose option B because", "(b)"),
        ("Open", None),
        ("It has a tail", "(a)"),  # a letter at the end of any word counts
        ("b", "(b)"),
        ("because", "(b)"),  # so does the first letter
        ("", None),
    ],
)
def test_lmms_eval_searches_the_text_for_a_letter(answer: str, parsed: str | None) -> None:
    assert mmvp.parse_option_lmms_eval(answer) == parsed


def test_lmms_eval_protocol_corrects_the_published_labels() -> None:
    questions = [make_question(number, ("(a)", "x", "y"), unit="50") for number in (99, 100)]
    answers = {"99": "b", "100": "a"}
    by_protocol = {
        protocol: metric_values(score_answers("mmvp", mmvp.BENCHMARK.scoring, questions, answers, protocol))
        for protocol in ("letter", "lmms-eval")
    }
    assert by_protocol["letter"] == {"pair_accuracy": 0.0, "accuracy": 0.5}
    assert by_protocol["lmms-eval"] == {"pair_accuracy": 1.0, "accuracy": 1.0}
