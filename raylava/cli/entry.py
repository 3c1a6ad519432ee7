"""A command line in, its exit status out: parse, run, tell mistakes in one line."""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import IO

from raylava.cli import clusters, estimating, looking, making, scores
from raylava.cli.command import DEFAULT_STORAGE, Handler, Outcome, Parser
from raylava.console import Console, quiet
from raylava.errors import UserError, first_line
from raylava.storage import cache_folder

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    try:
        arguments = _parse(argv)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    log = (
        cache_folder()
        / "logs"
        / f"{arguments.command}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}.log"
    )
    with quiet(log) as (out, console):
        return _run(arguments, out, console)


def job(command: str, subject: str, *fixed: str) -> int:
    """A command as jobs/ calls it, what it is about given as an option (`--recipe FILE`); returns its exit status."""
    from raylava.cluster.jobs import check_shared

    parser = argparse.ArgumentParser(description=f"raylava {command}, as a job", add_help=False)
    parser.add_argument(subject, dest="subject", required=True)
    parser.add_argument("--storage", required=True)
    given, rest = parser.parse_known_args()
    try:
        check_shared(given.storage)
    except UserError as error:
        parser.error(str(error))
    return main([command, given.subject, *fixed, "--storage", given.storage, *rest])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes overrides only where they stand together; people also put them after options."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not all("=" in one and not one.startswith("-") and hasattr(arguments, "overrides") for one in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _run(arguments: argparse.Namespace, out: IO[str], console: Console) -> int:
    try:
        outcome: Outcome = arguments.handler(arguments, console)
    except UserError as error:
        console.error(first_line(error))
        return 2
    except KeyboardInterrupt:
        console.error("stopped; the same command goes on from what is finished")
        return 130
    except Exception as error:  # told in one line; the log file has the rest
        logger.info("the command failed", exc_info=error)
        console.error(first_line(error))
        console.say(f"[dim]all that was written on the way: {console.log}[/]")
        return 1
    if arguments.json:
        out.write(json.dumps(outcome.data, ensure_ascii=False) + "\n")
    elif outcome.text is not None:
        out.write(outcome.text.rstrip("\n") + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    common = Parser(add_help=False)
    common.add_argument(
        "--storage", metavar="URI", default=DEFAULT_STORAGE, help="where artifacts are kept (%(default)s)"
    )
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser = Parser(
        prog="raylava", description="LLaVA-Gemma on Ray: corpora in, a Hugging Face model and its scores out."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, handler: Handler, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[common], help=about, description=about)
        added.set_defaults(handler=handler)
        return added

    for room in (making, scores, looking, estimating, clusters):
        room.register(add)
    return parser
