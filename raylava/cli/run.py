"""`raylava run`: build every missing artifact of a recipe."""

import time
from typing import Annotated, Literal

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import DEFAULT_STORAGE, AsJson, Overrides, RecipeFile, Storage
from raylava.console import Console


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    only: Annotated[
        Literal["prepare"] | None, typer.Option("--only", metavar="STAGE", help="prepare: build the corpora only")
    ] = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> int:
    """Build every missing artifact of a recipe."""
    return execute("run", as_json, lambda console: _run(recipe, overrides or [], only, storage, console))


def _run(recipe_file: str, overrides: list[str], only: str | None, storage: str, console: Console) -> CommandResult:
    from raylava.api import runs
    from raylava.pipeline.report import show_results
    from raylava.pipeline.run_report.page import report_run
    from raylava.storage import writable

    started = time.time()
    run = runs.run(recipe_file, overrides, storage=storage, only=only, reporter=console)
    show_results(run.artifacts, console)
    options = ["--only", only] if only else []
    command = ["raylava", "run", recipe_file, *overrides, *options, "--storage", storage]
    report_run(run.recipe, run.artifacts, writable(storage), command, started, console)
    return CommandResult(run.summary())
