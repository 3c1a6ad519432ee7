"""MM-Vet averages a judge's grades over all questions and by capability."""

import pytest

from raylava.errors import UserError
from raylava.evaluation.benchmarks import mm_vet
from raylava.evaluation.metrics.scoring import score_grades
from tests.support.scoring import make_question, metric_values


def test_grades_are_averaged_overall_and_by_capability() -> None:
    questions = [
        make_question("v1_0", "x", "ocr,math"),
        make_question("v1_1", "x", "rec"),
        make_question("v1_2", "x", "rec"),
    ]
    result = score_grades("mm-vet", mm_vet.BENCHMARK.scoring, questions, {"v1_0": 1.0, "v1_1": 0.5})
    values = metric_values(result)
    assert values["total"] == pytest.approx(50.0)
    assert (values["ocr"], values["rec"], values["math"]) == pytest.approx((100.0, 25.0, 100.0))
    assert result.missing == ("v1_2",)
    with pytest.raises(UserError, match="v1_1: the judge's grade is 7"):
        score_grades("mm-vet", mm_vet.BENCHMARK.scoring, questions, {"v1_1": 7.0})
