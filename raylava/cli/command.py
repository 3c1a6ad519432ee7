"""Run the body of a command: redirect output, map exceptions to exit statuses, print the result."""

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from raylava.console import Console, escape, printable, redirect_output
from raylava.errors import UserError, first_line, redact_urls

logger = logging.getLogger(__name__)

_JSON_ESCAPES = {code: f"\\u{code:04x}" for code in range(127, 160)}  # terminals act on some of these
_CLOSED_PIPE = 141  # the status of a process that SIGPIPE ends


@dataclass(frozen=True)
class OutputOptions:
    """The global options: show errors and the result only, and the level of raylava's log that the console shows."""

    quiet: bool = False
    log_level: int = logging.WARNING


_DEFAULT_OPTIONS = OutputOptions()
output_options: ContextVar[OutputOptions] = ContextVar("output_options", default=_DEFAULT_OPTIONS)


@dataclass(frozen=True)
class CommandResult:
    """The result of a command: `data` for --json, `text` for standard output (None: everything was displayed)."""

    data: dict[str, Any]
    text: str | None = None


def execute(name: str, as_json: bool, body: Callable[[Console], CommandResult]) -> int:
    """Run a command's body and return the exit status. All output but its result goes to a log file."""
    timestamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}"
    options = output_options.get()
    log = _log_folder() / f"{name}-{timestamp}.log"
    with redirect_output(log, options.quiet, options.log_level) as (out, console):
        try:
            result = body(console)
            _print_result(result, as_json, out)
            return 0
        except UserError as error:
            console.error(first_line(error))
            return 2
        except KeyboardInterrupt:
            console.error("interrupted; re-run the same command to resume")
            return 130
        except BrokenPipeError:  # what reads the output has ended, as `head` does
            return _CLOSED_PIPE
        except Exception as error:  # reported in one line; the traceback is in the log file
            logger.info("the command failed", exc_info=error)
            console.error(first_line(error))
            console.show(f"[dim]complete log: {escape(str(console.log))}[/]")
            return 1


def _log_folder() -> Path:
    """Return the folder for log files: in the user's cache or, if that cannot be written, a temporary one."""
    from raylava.storage import cache_folder  # imports pyarrow, which --help does not need

    folder = cache_folder() / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="raylava-logs-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="raylava-logs-"))


def write_output(option: str, file: str, content: bytes) -> None:
    """Write a file that an option names. Raises UserError when it cannot be written."""
    try:
        Path(file).write_bytes(content)
    except OSError as error:
        raise UserError(f"{option} {file}: cannot be written ({error.strerror}); name another file") from error


def _print_result(result: CommandResult, as_json: bool, out: IO[str]) -> None:
    if as_json:
        out.write(redact_urls(json.dumps(result.data, ensure_ascii=False)).translate(_JSON_ESCAPES) + "\n")
    elif result.text is not None:
        out.write(printable(redact_urls(result.text)).rstrip("\n") + "\n")
    out.flush()  # a full disk or a closed pipe is noticed here
