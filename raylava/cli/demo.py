"""`raylava demo`: train a small LLaVA on drawn images and let it answer questions about others."""

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import DEFAULT_STORAGE, AsJson, Overrides, Storage
from raylava.console import Console


def command(overrides: Overrides = None, storage: Storage = DEFAULT_STORAGE, as_json: AsJson = False) -> int:
    """Train a small LLaVA on drawn images and let it answer questions about others, in minutes."""
    return execute("demo", as_json, lambda console: _demo(overrides or [], storage, console))


def _demo(overrides: list[str], storage: str, console: Console) -> CommandResult:
    from raylava.toy.demo import demo

    return CommandResult(demo(storage, overrides, console))
