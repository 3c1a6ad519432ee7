"""`raylava toy`: build the demo's corpus and backbones in a folder."""

from pathlib import Path
from typing import Annotated

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import DEFAULT_STORAGE, AsJson, Storage
from raylava.console import Console
from raylava.errors import UserError


def command(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="where to link the corpus and backbones")],
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> int:
    """Build the demo's corpus and backbones in a folder."""
    return execute("toy", as_json, lambda console: _toy(Path(folder), storage, console))


def _toy(folder: Path, storage: str, console: Console) -> CommandResult:
    from raylava.local_copies import local_copy
    from raylava.storage import storage_path
    from raylava.toy.demo import make_toy_assets

    if not Path(storage_path(folder).path).parent.is_dir():
        raise UserError(f"{folder}: the folder that it would be in does not exist; create it first")
    if folder.exists() and not folder.is_symlink():
        raise UserError(f"{folder}: exists and is not a link to toy assets; name a new folder")
    artifact = make_toy_assets(storage, console)
    if folder.is_symlink() and folder.resolve().parent.name == artifact.stage:
        folder.unlink()  # a link to these or to earlier toy assets
    elif folder.exists():
        raise UserError(f"{folder}: exists and is not a link to toy assets; name a new folder")
    folder.symlink_to(local_copy(artifact.path), target_is_directory=True)
    next_command = "raylava run toy"
    return CommandResult({"toy_assets": str(artifact.path)}, f"{folder}: corpus and backbones; next: {next_command}")
