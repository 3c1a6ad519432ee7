"""`raylava inspect`: show the contents of a prepared corpus."""

from pathlib import Path
from typing import Annotated

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import AsJson
from raylava.console import Console
from raylava.errors import UserError


def command(
    artifact: Annotated[str, typer.Argument(metavar="PATH", help="a prepare artifact's folder")],
    samples: Annotated[int, typer.Option("--samples", min=0, metavar="N", help="samples on the page")] = 24,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="the page to write (default: inspect-FINGERPRINT.html)")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Show the contents of a prepared corpus as a table and as a page of samples."""
    return execute("inspect", as_json, lambda console: _inspect(artifact, samples, html, console))


def _inspect(path: str, samples: int, html: str | None, console: Console) -> CommandResult:
    from transformers import AutoTokenizer

    from raylava.artifacts import load_artifact
    from raylava.cli.tables import corpus_table
    from raylava.corpus.blocks import TOKENIZER
    from raylava.corpus.inspect import inspect_corpus, page
    from raylava.local_copies import local_copy

    artifact = load_artifact(path)
    if artifact.stage != "prepare":
        raise UserError(f"{path}: an artifact of {artifact.stage}; inspect shows artifacts of prepare")
    inspection = inspect_corpus(artifact.path, samples, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(local_copy(artifact.path / TOKENIZER), trust_remote_code=False)
    file = Path(html or f"inspect-{artifact.fingerprint}.html")
    file.write_text(page(inspection, f"prepare {artifact.fingerprint}", tokenizer), encoding="utf-8")
    console.show(corpus_table(inspection))
    data = artifact.metrics | {
        "histogram": inspection.histogram,
        "by_source": inspection.quarantined_by_source,
        "page": str(file),
    }
    return CommandResult(data, f"page: {file}")
