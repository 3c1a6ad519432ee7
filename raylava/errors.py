"""The exceptions whose message is shown to the user as one line, and the one-line form of any other exception."""


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
