"""The exceptions whose message is shown to the user as one line, and the one-line form of any other failure."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from subprocess import CompletedProcess


class UserError(Exception):
    """A mistake in the input. The message names the key or path, the value and the fix. Exit status 2."""


class RunError(Exception):
    """A run that failed for a reason other than the user's input. Exit status 1."""


def first_line(error: BaseException) -> str:
    """Return the error in one line of at most 300 characters, prefixed with its type unless it is raylava's own."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    if isinstance(error, (UserError, RunError)):
        return text
    return f"{type(error).__name__}: {text}"[:300]


def last_line(command: "CompletedProcess[str]") -> str:
    """Return the last line of a failed command's standard error, or of its output if that is empty."""
    return "".join((command.stderr.strip() or command.stdout.strip()).splitlines()[-1:])
