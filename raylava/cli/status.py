"""`raylava status`: list the artifacts in storage and the progress of those that are being built."""

from dataclasses import asdict
from typing import Annotated

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import DEFAULT_STORAGE, AsJson, Overrides, Storage
from raylava.console import Console


def command(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="list the artifacts of this recipe only")
    ] = None,
    overrides: Overrides = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> int:
    """List the artifacts in storage and the progress of those that are being built."""
    return execute("status", as_json, lambda console: _status(recipe, overrides or [], storage, console))


def _status(recipe: str | None, overrides: list[str], storage: str, console: Console) -> CommandResult:
    from raylava.cli.tables import status_table
    from raylava.pipeline.status import list_artifacts
    from raylava.storage import storage_path

    root = storage_path(storage)
    statuses = list_artifacts(root, _fingerprints(recipe, overrides, storage) if recipe else None)
    if statuses:
        console.show(status_table(statuses))
    text = None if statuses else f"{root}: no artifacts yet"
    return CommandResult({"artifacts": [asdict(status) for status in statuses]}, text)


def _fingerprints(recipe: str, overrides: list[str], storage: str) -> set[str]:
    from raylava.config.load import load_recipe
    from raylava.pipeline.graph import build_stages
    from raylava.storage import storage_path

    stages = build_stages(load_recipe(recipe, overrides), storage_path(storage))
    return {stage.spec().fingerprint for stage in stages}
