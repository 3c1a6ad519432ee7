"""`raylava replay`: recompute a non-finite step sample by sample."""

from dataclasses import asdict
from typing import Annotated

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import AsJson
from raylava.console import Console

_MAX_IDS = 5


def command(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="the replay-step folder that a failed run names")],
    as_json: AsJson = False,
) -> int:
    """Recompute each sample of a non-finite step by itself."""
    return execute("replay", as_json, lambda console: _replay(folder, console))


def _replay(folder: str, console: Console) -> CommandResult:
    from raylava.cli.tables import replay_table
    from raylava.storage import storage_path
    from raylava.train.replay import replay

    samples = list(replay(storage_path(folder)))
    console.show(replay_table(samples))
    non_finite = [sample.sample_id for sample in samples if not sample.finite]
    ids = f": {', '.join(non_finite[:_MAX_IDS])}" if non_finite else ""
    text = f"{len(non_finite)} of {len(samples)} samples are not finite by themselves{ids}"
    return CommandResult({"samples": [asdict(sample) for sample in samples]}, text)
