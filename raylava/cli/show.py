"""`raylava show`: print the record of an artifact."""

import json
from typing import Annotated

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import AsJson


def command(
    artifact: Annotated[str, typer.Argument(metavar="PATH", help="an artifact's folder")], as_json: AsJson = False
) -> int:
    """Print what produced an artifact: settings, inputs, versions, metrics."""
    return execute("show", as_json, lambda console: _show(artifact))


def _show(path: str) -> CommandResult:
    from raylava.artifacts import load_artifact

    record = load_artifact(path).record
    return CommandResult(record, json.dumps(record, indent=2, ensure_ascii=False))
