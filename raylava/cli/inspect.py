"""`raylava inspect`: show the contents of a prepared corpus, or what is wrong with the sources of a recipe."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from raylava.cli.command import CommandResult, execute, write_output
from raylava.cli.options import DEFAULT_STORAGE, AsJson, Overrides, Storage
from raylava.console import Console
from raylava.errors import UserError

if TYPE_CHECKING:
    from raylava.corpus.source_check import SourceCheck


def command(
    artifact: Annotated[str, typer.Argument(metavar="PATH", help="a prepare artifact; with --source, a recipe")],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option("--samples", min=0, metavar="N", help="samples on the page")] = 24,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="the page to write (default: inspect-FINGERPRINT.html)")
    ] = None,
    source: Annotated[
        bool, typer.Option("--source", help="check every row and image of a recipe's sources before a run")
    ] = False,
    csv: Annotated[
        str, typer.Option("--csv", metavar="FILE", help="with --source, the list of findings to write")
    ] = "inspect-sources.csv",
    repair: Annotated[
        bool, typer.Option("--repair", help="with --source, link images that are there under another suffix")
    ] = False,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> int:
    """Show the contents of a prepared corpus, or check the sources of a recipe."""
    if source:
        return execute(
            "inspect",
            as_json,
            lambda console: _inspect_sources(artifact, overrides or [], csv, repair, storage, console),
        )
    return execute("inspect", as_json, lambda console: _inspect(artifact, overrides or [], samples, html, console))


def _inspect_sources(
    recipe_file: str, overrides: list[str], csv: str, repair: bool, storage: str, console: Console
) -> CommandResult:
    from raylava.cli.tables import source_table
    from raylava.cluster.session import ray_session
    from raylava.config.load import load_recipe
    from raylava.corpus.source_check import repair_images
    from raylava.pipeline.graph import build_prepare_stages
    from raylava.storage import writable

    recipe = load_recipe(recipe_file, overrides)
    stages = build_prepare_stages(recipe, writable(storage))
    for stage in stages:
        stage.validate_sources()
    checks: dict[str, SourceCheck] = {}
    repaired = 0
    with ray_session(recipe.resources):
        for stage in stages:
            with console.stage(stage.label.replace("prepare", "inspect"), "rows") as progress:
                check = checks[stage.label] = stage.check_sources(progress)
    for label, check in checks.items():
        console.show(source_table(label.removeprefix("prepare "), check))
    write_output("--csv", csv, _findings(checks))
    if repair:
        repaired = sum(repair_images(checks[stage.label], stage.image_roots) for stage in stages)
    return CommandResult(
        {label.removeprefix("prepare "): _counts(check) for label, check in checks.items()} | {"repaired": repaired},
        _summary(checks, csv, repaired),
    )


def _findings(checks: "dict[str, SourceCheck]") -> bytes:
    first, *others = (check.to_csv() for check in checks.values())
    return first + b"".join(content.partition(b"\n")[2] for content in others)


def _counts(check: "SourceCheck") -> dict[str, Any]:
    by_file: dict[str, dict[str, int]] = {}
    for (file, reason), count in check.counts().items():
        by_file.setdefault(file, {})[reason] = count
    return {"rows": check.rows, "images": check.images, "by_url": check.by_url, "findings": by_file}


def _summary(checks: "dict[str, SourceCheck]", csv: str, repaired: int) -> str:
    findings = [finding for check in checks.values() for finding in check.findings]
    repairable = len({(finding.source, finding.image) for finding in findings if finding.repair}) - repaired
    text = f"{len(findings):,} findings: {csv}"
    text += f"; {repaired:,} images repaired by links" if repaired else ""
    return text + (f"; {repairable:,} could be repaired by links: add --repair" if repairable else "")


def _inspect(path: str, overrides: list[str], samples: int, html: str | None, console: Console) -> CommandResult:
    from transformers import AutoTokenizer

    from raylava.artifacts import load_artifact
    from raylava.cli.tables import corpus_table
    from raylava.corpus.blocks import TOKENIZER
    from raylava.corpus.inspect import inspect_corpus, page
    from raylava.local_copies import local_copy

    if overrides:
        raise UserError(f"{overrides[0]}: an artifact has no settings to change; overrides go with --source")
    artifact = load_artifact(path)
    if artifact.stage != "prepare":
        raise UserError(f"{path}: an artifact of {artifact.stage}; inspect shows artifacts of prepare")
    inspection = inspect_corpus(artifact.path, samples, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(local_copy(artifact.path / TOKENIZER), trust_remote_code=False)
    file = html or f"inspect-{artifact.fingerprint}.html"
    write_output("--html", file, page(inspection, f"prepare {artifact.fingerprint}", tokenizer).encode())
    console.show(corpus_table(inspection))
    data = artifact.metrics | {
        "histogram": inspection.histogram,
        "by_source": inspection.quarantined_by_source,
        "page": file,
    }
    return CommandResult(data, f"page: {file}")
