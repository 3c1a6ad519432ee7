"""Run the body of a command: redirect output, map exceptions to exit statuses, print the result."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from raylava.console import Console, redirect_output
from raylava.errors import UserError, first_line
from raylava.storage import cache_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CommandResult:
    """The result of a command: `data` for --json, `text` for standard output (None: everything was displayed)."""

    data: dict[str, Any]
    text: str | None = None


def execute(name: str, as_json: bool, body: Callable[[Console], CommandResult]) -> int:
    """Run a command's body and return the exit status. All output but its result goes to a log file."""
    timestamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}"
    with redirect_output(cache_folder() / "logs" / f"{name}-{timestamp}.log") as (out, console):
        try:
            result = body(console)
        except UserError as error:
            console.error(first_line(error))
            return 2
        except KeyboardInterrupt:
            console.error("interrupted; re-run the same command to resume")
            return 130
        except Exception as error:  # reported in one line; the traceback is in the log file
            logger.info("the command failed", exc_info=error)
            console.error(first_line(error))
            console.say(f"[dim]complete log: {console.log}[/]")
            return 1
        _print_result(result, as_json, out)
        return 0


def _print_result(result: CommandResult, as_json: bool, out: IO[str]) -> None:
    if as_json:
        out.write(json.dumps(result.data, ensure_ascii=False) + "\n")
    elif result.text is not None:
        out.write(result.text.rstrip("\n") + "\n")
