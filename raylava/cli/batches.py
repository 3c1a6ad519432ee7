"""`raylava batches`: list the samples of each training step."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import AsJson


def command(
    artifact: Annotated[str, typer.Argument(metavar="PATH", help="a pretrain or finetune artifact's folder")],
    first: Annotated[int, typer.Option("--first", min=0, metavar="STEP", help="first step to list")] = 0,
    last: Annotated[int | None, typer.Option("--last", min=0, metavar="STEP", help="last step to list")] = None,
    as_json: AsJson = False,
) -> int:
    """List the sample ids of each training step as JSON lines, by loss group."""
    return execute("batches", as_json, lambda console: _batches(artifact, first, last))


def _batches(path: str, first: int, last: int | None) -> CommandResult:
    from raylava.artifacts import load_artifact
    from raylava.pipeline.batches import planned_steps

    steps = [asdict(step) for step in planned_steps(load_artifact(path), first, last)]
    return CommandResult({"steps": steps}, "\n".join(json.dumps(step, ensure_ascii=False) for step in steps))
