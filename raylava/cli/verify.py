"""`raylava verify`: compare the files of an artifact with their recorded hashes."""

from typing import Annotated

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import AsJson
from raylava.errors import RunError, UserError


def command(
    artifact: Annotated[str, typer.Argument(metavar="PATH", help="an artifact's folder")], as_json: AsJson = False
) -> int:
    """Compare the files of an artifact with the SHA-256 that were recorded when it was built."""
    return execute("verify", as_json, lambda _: _verify(artifact))


def _verify(path: str) -> CommandResult:
    """Raises RunError, which names the first damaged files and counts all, when some differ."""
    from raylava.artifacts import damaged_files, load_artifact
    from raylava.corpus.blocks import read_manifest

    artifact = load_artifact(path)
    hashes = dict(artifact.record.get("files", {}))
    if not hashes:
        raise UserError(f"{path}: was built before raylava recorded hashes; build it again to verify it")
    if artifact.stage == "prepare":
        hashes |= read_manifest(artifact.path).file_hashes()
    damaged = damaged_files(artifact.path, hashes)
    if damaged:
        raise RunError(f"{path}: {len(damaged)} of {len(hashes)} files are damaged: {'; '.join(damaged[:3])}")
    return CommandResult({"files": len(hashes)}, f"{path}: {len(hashes)} files, all as they were built")
