"""The exceptions whose message is shown to the user as one line, and the one-line form of any other failure."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from subprocess import CompletedProcess


# The user of a URL ends at the first @; a password may hold characters that belong to no URL.
_URL = re.compile(
    r"(?<![a-z0-9+.-])([a-z][a-z0-9+.-]{0,20}://)([^\s/?#]{0,300}@|[^\s@:]{0,300}:[^\s@]{0,300}@)?"
    r"([^\s?#\"'<>]*)([?#][^\s\"'<>]*)?",
    re.IGNORECASE,
)
_USER_IS_NO_SECRET = ("abfs://", "abfss://", "hdfs://")  # the name of a container, or of a user without a password
SECRET_NAMES = re.compile(
    r"secret|passw|pwd|token|credential|auth|access_?key|api_?key|sig(nature)?\b|-sign", re.IGNORECASE
)


class UserError(Exception):
    """A mistake in the input. The message names the key or path, the value and the fix. Exit status 2."""


class RunError(Exception):
    """A run that failed for a reason other than the user's input. Exit status 1."""


def first_line(error: BaseException) -> str:
    """Return the error in one line, without secrets in URLs.

    An error that is not raylava's own is cut to 300 characters, and prefixed with its type unless it names a file and
    what the operating system says of it.
    """
    if isinstance(error, OSError) and error.filename and error.strerror:
        return redact_urls(" ".join(f"{error.filename}: {error.strerror}".split("\n")))
    lines = str(error).strip().splitlines()
    text = redact_urls(lines[0] if lines else "")
    if isinstance(error, (UserError, RunError)):
        return text
    return f"{type(error).__name__}: {text}"[:300]


def redact_urls(text: str) -> str:
    """Return the text with users, passwords and signed queries of its URLs replaced by dots."""
    return _URL.sub(_redact_url, text) if "://" in text else text


def _redact_url(url: "re.Match[str]") -> str:
    scheme, user, rest, query = url.groups(default="")
    if user and (":" in user or scheme.lower() not in _USER_IS_NO_SECRET):
        user = "…@"
    return scheme + user + rest + (f"{query[0]}…" if SECRET_NAMES.search(query) else query)


def last_line(command: "CompletedProcess[str]") -> str:
    """Return the last line of a failed command's standard error, or of its output if that is empty."""
    return "".join((command.stderr.strip() or command.stdout.strip()).splitlines()[-1:])
