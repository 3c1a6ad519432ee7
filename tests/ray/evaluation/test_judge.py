"""A judge is a program that reads a prompt on stdin and prints a grade."""

import sys
from pathlib import Path

import pytest

from raylava.errors import RunError, UserError
from raylava.evaluation.judge import grade_answers
from raylava.evaluation.questions import GeneratedAnswer, Question
from raylava.progress import NullProgressBar
from raylava.storage import storage_path

JUDGE = "import sys; prompt = sys.stdin.read(); print('I say', 0.5 if 'What is 1?' in prompt else 1.0)"


def make_questions(count: int) -> list[Question]:
    """Return text questions `What is 0?`, `What is 1?`, …"""
    return [Question(str(number), None, f"What is {number}?", "all", ("x",)) for number in range(count)]


def test_each_answer_is_graded_once(tmp_path: Path) -> None:
    answers = [GeneratedAnswer("0", "", "a"), GeneratedAnswer("1", "", "b"), GeneratedAnswer("2", "", None)]
    file = storage_path(tmp_path / "grades.json")
    command = f'{sys.executable} -c "{JUDGE}"'
    grades = grade_answers(make_questions(3), answers, command, file, NullProgressBar())
    assert grades == {"0": 1.0, "1": 0.5, "2": None}
    saved = grade_answers(make_questions(3), answers, "/no/such/judge", file, NullProgressBar())
    assert saved == grades, "saved grades are reused"


@pytest.mark.parametrize(
    ("program", "message"),
    [("print('good')", "printed no number but 'good"), ("print(7)", "printed 7.0"), ("1/0", "division by zero")],
)
def test_judge_without_a_valid_grade_is_reported(program: str, message: str, tmp_path: Path) -> None:
    answers, file = [GeneratedAnswer("0", "", "a")], storage_path(tmp_path / "grades.json")
    with pytest.raises(RunError, match=message):
        grade_answers(make_questions(1), answers, f'{sys.executable} -c "{program}"', file, NullProgressBar())
    with pytest.raises(UserError, match="cannot be run"):
        grade_answers(make_questions(1), answers, "/no/such/judge", file, NullProgressBar())
    with pytest.raises(UserError, match="quote it as in a shell command"):
        grade_answers(make_questions(1), answers, "judge 'half", file, NullProgressBar())
