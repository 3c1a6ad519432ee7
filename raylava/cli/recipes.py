"""`raylava recipes`: list the shipped recipes and sweeps, print one, or copy it to a new file."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import AsJson, help_text
from raylava.errors import UserError

Name = Annotated[str, typer.Argument(metavar="NAME", help="a name that `raylava recipes` lists")]

group = typer.Typer(invoke_without_command=True)


@group.callback()
def list_recipes(context: typer.Context, as_json: AsJson = False) -> int:
    """List the shipped recipes and sweeps. Their names are accepted wherever a file of one is."""
    if context.invoked_subcommand is not None:
        return 0
    return execute("recipes", as_json, lambda console: _list())


@group.command("show", help=help_text("Print the file of a shipped recipe or sweep.", "raylava recipes show toy"))
def show_recipe(name: Name, as_json: AsJson = False) -> int:
    """Print the file of a shipped recipe or sweep."""
    return execute("recipes", as_json, lambda console: _show(name))


@group.command(
    "copy",
    help=help_text(
        "Copy a shipped recipe or sweep to a new file, which works from any folder.",
        "raylava recipes copy toy mine.yaml",
    ),
)
def copy_recipe(
    name: Name,
    file: Annotated[str, typer.Argument(metavar="FILE", help="the file to write; it must not exist")],
    as_json: AsJson = False,
) -> int:
    """Copy a shipped recipe or sweep to a new file, which works from any folder."""
    return execute("recipes", as_json, lambda console: _copy(name, file))


def _list() -> CommandResult:
    from raylava.config.shipped import shipped_recipes

    recipes = shipped_recipes()
    width = max(len(recipe.name) for recipe in recipes)
    lines = [f"{recipe.name:<{width}}  {recipe.kind:<6}  {recipe.description}" for recipe in recipes]
    data = [asdict(recipe) | {"file": str(recipe.file)} for recipe in recipes]
    return CommandResult({"recipes": data}, "\n".join(lines))


def _show(name: str) -> CommandResult:
    from raylava.config.shipped import shipped_recipe

    recipe = shipped_recipe(name)
    text = recipe.file.read_text(encoding="utf-8")
    return CommandResult({"name": name, "kind": recipe.kind, "text": text}, text)


def _copy(name: str, file: str) -> CommandResult:
    from raylava.config.shipped import portable_text, shipped_recipe

    recipe = shipped_recipe(name)
    try:
        with Path(file).open("x", encoding="utf-8") as stream:
            stream.write(portable_text(recipe))
    except FileExistsError as error:
        raise UserError(f"{file}: exists already; name a new file") from error
    except (OSError, ValueError) as error:  # a name with a null character is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file}: cannot be written ({reason}); name another file") from error
    command = "sweep" if recipe.kind == "sweep" else "run"
    return CommandResult({"name": name, "file": file}, f"{file}: copy of {name}; next: raylava {command} {file}")
