"""`raylava demo`: train a small LLaVA on drawn images and let it answer questions about others."""

from typing import Annotated

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import DEFAULT_STORAGE, AsJson, Overrides, Storage
from raylava.console import Console


def command(
    overrides: Overrides = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**32 - 1, metavar="N", help="draws the images and starts all training")
    ] = 0,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> int:
    """Train a small LLaVA on drawn images and let it answer questions about others, in minutes."""
    return execute("demo", as_json, lambda console: _demo(overrides or [], seed, storage, console))


def _demo(overrides: list[str], seed: int, storage: str, console: Console) -> CommandResult:
    from raylava.toy.demo import demo

    return CommandResult(demo(storage, overrides, console, seed=seed))
