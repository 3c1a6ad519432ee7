"""Bootstrap intervals contain their metric and narrow with the number of questions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylava.evaluation.metrics.score_table import Metric, paired_interval
from raylava.evaluation.metrics.scoring import EXACT_MATCH, score_answers
from tests.support.scoring import make_question


def score_yes_answers(correct: list[bool]) -> Metric:
    """Score an answer per question that is correct or wrong as listed."""
    questions = [make_question(number, "yes") for number in range(len(correct))]
    answers = {str(number): "yes" if is_correct else "no" for number, is_correct in enumerate(correct)}
    return score_answers("custom", EXACT_MATCH, questions, answers).scores["exact_match"]


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_interval_contains_its_metric(correct: list[bool]) -> None:
    metric = score_yes_answers(correct)
    assert metric.low <= metric.value <= metric.high
    assert metric.value == pytest.approx(sum(correct) / len(correct))


def test_interval_narrows_with_the_number_of_questions() -> None:
    def width(count: int) -> float:
        metric = score_yes_answers([number % 2 == 1 for number in range(count)])
        return metric.high - metric.low

    assert width(400) == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1), "the normal approximation"
    assert width(400) < width(40)


def test_paired_interval_contains_the_mean_and_narrows_with_the_number_of_questions() -> None:
    generator = np.random.default_rng(1)
    differences = generator.choice([-1.0, 0.0, 0.0, 1.0, 1.0], (1, 2000))
    wide, narrow = paired_interval(differences[:, :100]), paired_interval(differences)
    assert narrow[0] < differences.mean() < narrow[1]
    assert narrow[1] - narrow[0] < wide[1] - wide[0]
