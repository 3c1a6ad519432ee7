"""MME's points: accuracy of questions plus accuracy of whole images."""

import pytest

from raylava.evaluation.benchmarks import mme
from raylava.evaluation.metrics.scoring import score_answers
from tests.support.scoring import make_question, metric_values


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [("Yes", "yes"), ("No.", "no"), ("  no", "no"), ("I say yes", "other"), ("Not", "no"), ("", "other")],
)
def test_only_the_first_four_characters_are_parsed(answer: str, parsed: str) -> None:
    assert mme.parse_yes_no(answer) == parsed


def test_points_add_question_accuracy_and_image_accuracy() -> None:
    questions = [
        make_question(1, "yes", "count", "count/1.jpg"),
        make_question(2, "no", "count", "count/1.jpg"),
        make_question(3, "yes", "count", "count/2.jpg"),
        make_question(4, "no", "count", "count/2.jpg"),
        make_question(5, "yes", "code_reasoning", "code_reasoning/1.png"),
        make_question(6, "no", "code_reasoning", "code_reasoning/1.png"),
    ]
    answers = {"1": "Yes", "2": "No", "3": "Yes", "4": "Yes", "5": "perhaps", "6": "no"}
    result = score_answers("mme", mme.BENCHMARK.scoring, questions, answers)
    assert metric_values(result) == {"perception": 75.0 + 50.0, "cognition": 50.0}
    assert result.by_category["count"]["units"] == 2.0
