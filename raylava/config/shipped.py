"""The recipes and sweeps that raylava ships, and the names that stand for them wherever a file is expected."""

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raylava.errors import UserError

_SUFFIXES = (".yaml", ".yml")
_PARENT_KEY = re.compile(r"^(extends|recipe):(\s*)([^\s#]+)", re.MULTILINE)


@dataclass(frozen=True)
class ShippedRecipe:
    """A shipped recipe or sweep; `description` is the first comment line of its file."""

    name: str
    kind: Literal["recipe", "sweep"]
    description: str
    file: Path


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: in the wheel, or in the checkout that raylava is installed from."""
    package = Path(__file__).parents[1]
    for folder in (package / "recipes", package.parent / "jobs" / "recipes"):
        if folder.is_dir():
            return folder
    raise UserError("the shipped recipes are missing from this installation; reinstall raylava")


def shipped_recipes() -> list[ShippedRecipe]:
    """List the shipped recipes and sweeps by name."""
    return [_describe(file) for file in sorted(recipes_folder().glob("*.yaml"), key=lambda file: file.stem)]


def shipped_recipe(name: str) -> ShippedRecipe:
    """Return the shipped recipe or sweep with this name. Raises UserError for an unknown name."""
    return _describe(_shipped_file(name, f"{name}: no shipped recipe has this name"))


def locate(reference: str, folder: Path | None = None) -> Path:
    """Return the file that a path, relative to `folder` (default: the current one), or a shipped recipe's name means.

    A name has no slash and no suffix .yaml or .yml. A file that exists takes precedence over a shipped recipe. Raises
    UserError for an unknown name.
    """
    path = (folder or Path()) / reference
    if not _is_name(reference) or os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have
        return path
    return _shipped_file(reference, f"{reference}: neither a file nor a shipped recipe")


def portable_text(recipe: ShippedRecipe) -> str:
    """Return the text of a shipped file that works in any folder: it refers to its parent by name, not by path."""
    names = {file.name: file.stem for file in recipes_folder().glob("*.yaml")}

    def by_name(match: re.Match[str]) -> str:
        key, space, parent = match.groups()
        return f"{key}:{space}{names.get(parent, parent)}"

    return _PARENT_KEY.sub(by_name, recipe.file.read_text(encoding="utf-8"))


def _is_name(reference: str) -> bool:
    return bool(reference) and "/" not in reference and not reference.endswith(_SUFFIXES)


def _shipped_file(name: str, problem: str) -> Path:
    files = {file.stem: file for file in recipes_folder().glob("*.yaml")}
    if name in files:
        return files[name]
    similar = difflib.get_close_matches(name, files, n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(similar)}?" if similar else "`raylava recipes` lists the shipped ones"
    raise UserError(f"{problem}; {advice}")


def _describe(file: Path) -> ShippedRecipe:
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = next(_comment_lines(lines), "")
    is_sweep = any(line.startswith("recipe:") for line in lines)
    return ShippedRecipe(file.stem, "sweep" if is_sweep else "recipe", comment, file)


def _comment_lines(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if line.startswith("#") and line.strip("# "):
            yield line.strip("# ")
