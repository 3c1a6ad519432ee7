"""A judge that is somebody else's program: it reads a prompt on standard input and prints a grade from 0 to 1.

Nothing here calls a network; what the program does is its owner's business.
"""

import json
import shlex
import subprocess
from collections.abc import Sequence

from raylava.console import ProgressBar
from raylava.errors import RunError, UserError
from raylava.evaluate.questions import Answer, Question
from raylava.storage import StoragePath

_SECONDS = 600  # that a judge may take for one answer

PROMPT = """Grade an answer to a question about a image, from 0.0 (wrong) to 1.0 (right), by how much of the truth it
has.
In the truth, <AND> joins parts that must all be there, <OR> parts of which one suffices.

Question: {question}
Truth: {truth}
Answer: {answer}

Print the grade alone, as a number.
"""


def graded(
    questions: Sequence[Question], answers: Sequence[Answer], command: str, kept: StoragePath, bar: ProgressBar
) -> dict[str, float | None]:
    """A grade for each answer, by question id; None where there is no answer.

    `kept` is the file that grades are kept in as they come: a judge may cost money, and is not asked twice.

    Raises UserError for a program that is not there, RunError where it fails or prints no number from 0 to 1.
    """
    found: dict[str, float | None] = json.loads(kept.read_bytes()) if kept.exists() else {}
    for question, answer in zip(questions, answers, strict=True):
        if question.question_id not in found:
            found[question.question_id] = None if answer.text is None else _grade(question, answer.text, command)
            kept.write_bytes(json.dumps(found).encode())
        bar.update(len(found), len(questions))
    return found


def _parsed(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise UserError(f"--judge {command}: {error}; quote it as for a shell") from error


def _grade(question: Question, text: str, command: str) -> float:
    prompt = PROMPT.format(question=question.text, truth=question.references[0], answer=text)
    try:
        run = subprocess.run(
            _parsed(command), input=prompt, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except OSError as error:
        raise UserError(
            f"--judge {command}: cannot be run ({error.strerror}); give a program and its arguments"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{question.question_id}: the judge took longer than {_SECONDS} s") from error
    try:
        grade = float(run.stdout.split()[-1])
    except (ValueError, IndexError) as error:
        told = run.stdout[-80:] or run.stderr[-200:]
        raise RunError(
            f"{question.question_id}: the judge ended with {run.returncode} and printed no number but {told!r}"
        ) from error
    if run.returncode != 0 or not 0 <= grade <= 1:
        raise RunError(f"{question.question_id}: the judge ended with {run.returncode} and printed {grade}")
    return grade
