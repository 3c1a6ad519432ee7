"""`raylava train`: train one stage without Ray."""

from typing import Annotated, Literal

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import DEFAULT_STORAGE, AsJson, Overrides, RecipeFile, Storage
from raylava.console import Console


def command(
    recipe: RecipeFile,
    stage: Annotated[Literal["pretrain", "finetune"], typer.Argument(metavar="STAGE", help="pretrain or finetune")],
    overrides: Overrides = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> int:
    """Train one stage without Ray, in one process or under `torchrun --no-python`."""
    return execute("train", as_json, lambda console: _train(recipe, stage, overrides or [], storage, console))


def _train(recipe_file: str, stage: str, overrides: list[str], storage: str, console: Console) -> CommandResult:
    from raylava.config.load import load_recipe
    from raylava.pipeline.runner import train_standalone
    from raylava.storage import writable

    recipe = load_recipe(recipe_file, overrides)
    artifact = train_standalone(recipe, writable(storage), stage, console)
    return CommandResult(artifact.record if artifact else {})
