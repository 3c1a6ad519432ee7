"""The errors that a person reads: one line each, with what to do about it."""


class UserError(Exception):
    """A mistake in what raylava was given: the message names the key or path, the value and the fix. Exit status 2."""


class RunError(Exception):
    """A run that failed for a reason that is not the user's input. Exit status 1."""


def first_line(error: BaseException) -> str:
    """The error in one line of at most 300 characters, with its type when the message alone says too little."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    if isinstance(error, (UserError, RunError)):
        return text
    return f"{type(error).__name__}: {text}"[:300]
