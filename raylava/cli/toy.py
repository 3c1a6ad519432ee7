"""`raylava toy`: build the demo's corpus and backbones, and link them in a folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import DEFAULT_STORAGE, AsJson, Storage
from raylava.console import Console
from raylava.errors import UserError

if TYPE_CHECKING:
    from raylava.artifacts import Artifact


def command(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="where to link the corpus and backbones")],
    ablations: Annotated[
        bool, typer.Option("--ablations", help="also the smaller language model and DINOv2 of the toy ablations")
    ] = False,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> int:
    """Build the demo's corpus and backbones in a folder."""
    return execute("toy", as_json, lambda console: _toy(Path(folder), ablations, storage, console))


def _toy(folder: Path, ablations: bool, storage: str, console: Console) -> CommandResult:
    from raylava.storage import storage_path
    from raylava.toy.demo import make_ablation_backbones, make_toy_assets

    if not Path(storage_path(folder).path).parent.is_dir():
        raise UserError(f"{folder}: the folder that it would be in does not exist; create it first")
    _check_replaceable(folder)
    artifacts = [make_toy_assets(storage, console)]
    if ablations:
        artifacts.append(make_ablation_backbones(storage, console))
    for artifact in artifacts:
        _link(artifact, folder)
    paths = [str(artifact.path) for artifact in artifacts]
    return CommandResult({"toy_assets": paths}, f"{folder}: corpus and backbones; next: raylava run toy")


def _check_replaceable(folder: Path) -> None:
    """Raise UserError unless the folder is new or holds nothing but links to toy assets."""
    entries = [folder] if folder.is_symlink() or not folder.is_dir() else [*folder.iterdir()]
    backbones = folder / "backbones"
    if backbones in entries and not backbones.is_symlink():
        entries.remove(backbones)
        entries += backbones.iterdir()
    if folder.exists() and not all(_links_toy_assets(entry) for entry in entries):
        raise UserError(f"{folder}: exists and is not a folder of links to toy assets; name a new folder")


def _links_toy_assets(entry: Path) -> bool:
    return entry.is_symlink() and not {"toy-assets", "copies"}.isdisjoint(entry.readlink().parts)


def _link(artifact: "Artifact", folder: Path) -> None:
    """Link the corpus and each backbone of an artifact below the folder, in place of earlier links."""
    from raylava.local_copies import local_copy

    if folder.is_symlink():  # as earlier versions linked them
        folder.unlink()
    source = Path(local_copy(artifact.path)).absolute()
    parts = [source / "corpus"] if (source / "corpus").is_dir() else []
    for part in (*parts, *sorted((source / "backbones").iterdir())):
        link = folder / part.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(part, target_is_directory=True)
