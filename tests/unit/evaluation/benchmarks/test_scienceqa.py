"""ScienceQA's letters are parsed by LLaVA's rule."""

import pytest

from raylava.evaluation.benchmarks import scienceqa
from raylava.evaluation.metrics.scoring import score_answers
from raylava.evaluation.questions import Question
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
    assert scienceqa.parse_letter(answer) == parsed


def test_science_qa_scores_questions_with_images_separately() -> None:
    with_image, text_only = make_question(1, "A"), Question("2", None, "text", "text", ("B",))
    result = score_answers("scienceqa", scienceqa.BENCHMARK.scoring, [with_image, text_only], {"1": "A", "2": "C"})
    assert metric_values(result) == {"image_accuracy": 1.0, "accuracy": 0.5}
    assert result.by_category == {
        "image": {"units": 1.0, "image_accuracy": 1.0, "accuracy": 1.0},
        "text": {"units": 1.0, "accuracy": 0.0},
    }


def test_accuracy_over_images_is_undefined_without_images() -> None:
    text_only = Question("2", None, "text", "text", ("B",))
    result = score_answers("scienceqa", scienceqa.BENCHMARK.scoring, [text_only], {"2": "B"})
    assert metric_values(result) == {"accuracy": 1.0}
    assert result.headline[0] == "accuracy"
