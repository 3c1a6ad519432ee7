"""What commands share: how one is added, what it may find, the options that several take."""

import argparse
import os
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from raylava.console import Console
from raylava.errors import UserError

DEFAULT_STORAGE = "raylava-storage"


class Outcome:
    """What a command found: `data` for programs, `text` for people on standard output (None: all was already shown)."""

    def __init__(self, data: dict[str, Any], text: str | None = None) -> None:
        self.data, self.text = data, text


Handler = Callable[[argparse.Namespace, Console], Outcome]


class Add(Protocol):
    """Adds a command: its name, what runs it, what it is for. Returns its parser, for options of its own."""

    def __call__(self, name: str, handler: Handler, about: str) -> argparse.ArgumentParser: ...


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def takes_recipe(parser: argparse.ArgumentParser) -> None:
    """A recipe's file, and settings to change in it."""
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    takes_overrides(parser)


def takes_overrides(parser: argparse.ArgumentParser) -> None:
    """`key=value` settings."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, such as finetune.lr=1e-5"
    )


def takes_address(parser: argparse.ArgumentParser, about: str) -> None:
    """A cluster's job server."""
    parser.add_argument("--address", metavar="URL", help=f"{about} (RAY_API_SERVER_ADDRESS)")


def job_server(arguments: argparse.Namespace) -> str | None:
    """The job server that is meant, if any is."""
    return arguments.address or os.environ.get("RAY_API_SERVER_ADDRESS")


def positive(text: str) -> int:
    """An option's whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return int(text)
