"""Grading by a judge: an external program that reads a prompt on stdin and prints a grade from 0 to 1.

This module makes no network calls; the program may.
"""

import json
import shlex
import subprocess
from collections.abc import Sequence

from raylava.errors import RunError, UserError
from raylava.evaluation.questions import GeneratedAnswer, Question
from raylava.progress import ProgressBar
from raylava.storage import StoragePath

_TIMEOUT_S = 600  # per answer

# Rewording the prompt may change grades.
PROMPT = """Grade an answer to a question about a picture, from 0.0 (wrong) to 1.0 (right), by how much of the truth it
has.
In the truth, <AND> joins parts that must all be there, <OR> parts of which one suffices.

Question: {question}
Truth: {truth}
Answer: {answer}

Print the grade alone, as a number.
"""


def grade_answers(
    questions: Sequence[Question],
    answers: Sequence[GeneratedAnswer],
    command: str,
    grades_file: StoragePath,
    progress: ProgressBar,
) -> dict[str, float | None]:
    """Return a grade for each answer by question id, or None where there is no answer.

    Grades are saved to `grades_file` one by one and reused from it, because a judge may charge for each call. Raises
    UserError if the program cannot be run, and RunError if it fails or prints no number from 0 to 1.
    """
    grades: dict[str, float | None] = json.loads(grades_file.read_bytes()) if grades_file.exists() else {}
    for question, answer in zip(questions, answers, strict=True):
        if question.question_id not in grades:
            grades[question.question_id] = None if answer.text is None else _grade(question, answer.text, command)
            grades_file.write_bytes(json.dumps(grades).encode())
        progress.update(len(grades), len(questions))
    return grades


def _grade(question: Question, answer: str, command: str) -> float:
    prompt = PROMPT.format(question=question.text, truth=question.references[0], answer=answer)
    process = _run_judge(question, prompt, command)
    status = f"{question.question_id}: the judge exited with status {process.returncode} and printed"
    try:
        grade = float(process.stdout.split()[-1])
    except (ValueError, IndexError) as error:
        output = process.stdout[-80:] or process.stderr[-200:]
        raise RunError(f"{status} no number but {output!r}; it must print a grade from 0 to 1") from error
    if process.returncode != 0 or not 0 <= grade <= 1:
        raise RunError(f"{status} {grade}; it must exit with status 0 and print a grade from 0 to 1")
    return grade


def _run_judge(question: Question, prompt: str, command: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            _split(command), input=prompt, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except OSError as error:
        raise UserError(
            f"--judge {command}: cannot be run ({error.strerror}); give a program and its arguments"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{question.question_id}: the judge took longer than {_TIMEOUT_S} s") from error


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise UserError(f"--judge {command}: {error}; quote it as in a shell command") from error
