"""Tables of single commands: benchmark results, comparisons, placements, status, prepared corpora, replayed steps."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from raylava.console import escape
from raylava.pipeline.results import category_score

if TYPE_CHECKING:
    from raylava.cluster.placement import Placement
    from raylava.config.recipe import Recipe
    from raylava.corpus.inspect import Inspection
    from raylava.corpus.source_check import SourceCheck
    from raylava.evaluation.compare import Comparison
    from raylava.pipeline.status import ArtifactStatus
    from raylava.train.replay import ReplayedSample

_STATE_STYLES = {"complete": "green", "building": "yellow", "stopped": "red", "damaged": "red"}
_CORPUS_COUNTS = ("rows_in", "rows", "truncated", "quarantined", "filtered", "images", "tokens", "loss_tokens")


def result_table(metrics: Mapping[str, Any]) -> Table:
    """Return one benchmark's metrics with 95 % intervals, then those of each category."""
    title = f"{metrics['benchmark']}: {metrics['questions']:,} questions, {metrics['missing']:,} without an answer "
    table = Table(title=f"{title}(protocol {metrics['protocol']})", title_justify="left")
    table.add_column("")
    for name in metrics["scores"]:
        table.add_column(name.replace("_", " "), justify="right")
    scores = metrics["scores"].values()
    table.add_row("all", *(f"{score['value']:.4g} [dim]{score['low']:.4g}–{score['high']:.4g}[/]" for score in scores))
    if len(metrics["by_category"]) > 1:
        table.add_section()
        for category, by_name in metrics["by_category"].items():
            values = [by_name.get(name) for name in metrics["scores"]]
            if all(value is None for value in values):
                values = [category_score(metrics, category)]
            table.add_row(escape(category), *("" if value is None else f"{value:.4g}" for value in values))
    return table


def comparison_table(comparison: "Comparison") -> Table:
    """Return each evaluation's mean score, and its difference to the first with a 95 % interval."""
    differing = sum(question.differs for question in comparison.questions)
    title = f"{comparison.benchmark}: {len(comparison.questions):,} questions, {differing:,} of them scored differently"
    table = Table("model", title=title, title_justify="left")
    for heading in ("mean score", "difference", "95 % interval"):
        table.add_column(heading, justify="right")
    differences = {difference.name: difference for difference in comparison.differences}
    for name, mean in comparison.mean_scores.items():
        cells = ("", "")
        if difference := differences.get(name):
            cells = (f"{difference.difference:+.3f}", f"{difference.low:+.3f} to {difference.high:+.3f}")
        table.add_row(escape(name), f"{mean:.3f}", *cells)
    return table


def placement_table(recipe: "Recipe", placements: "Sequence[Placement]", storage: str) -> Table:
    """Return what each stage requests of a cluster, and how many workers fit now and eventually."""
    table = Table("stage", "requests", title=f"{recipe.name} on this cluster", title_justify="left")
    for heading in ("fit now", "fit eventually", "nodes"):
        table.add_column(heading, justify="right")
    for placement in placements:
        eventually = "unknown" if placement.fits_eventually is None else f"{placement.fits_eventually:,}"
        table.add_row(
            ", ".join(placement.request.stages),
            placement.request.description,
            f"{placement.fits_now:,}",
            eventually,
            f"{placement.nodes or '':}",
            style="red" if placement.is_impossible else None,
        )
    shared = "a bucket, reached by every node" if "://" in storage else "a folder that every node must mount"
    table.caption = f"storage: {storage} ({shared}); up to {recipe.resources.cache_gb:g} GB of cache per training node"
    table.caption_justify = "left"
    return table


def status_table(statuses: "Sequence[ArtifactStatus]") -> Table:
    """Return the artifacts in storage, complete and incomplete, in stage order."""
    table = Table("stage", "artifact", "state", "", "when (UTC)", title="in storage", title_justify="left")
    for status in statuses:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(status.time)) if status.time else ""
        state = f"[{_STATE_STYLES[status.state]}]{status.state}[/]"
        table.add_row(status.stage, escape(status.fingerprint), state, escape(status.detail), when)
    return table


def corpus_table(inspection: "Inspection") -> Table:
    """Return a prepared corpus's counts, its length histogram, and its quarantined rows by source and reason."""
    manifest = inspection.manifest
    table = Table("count", title="prepared corpus", title_justify="left")
    table.add_column("value", justify="right")
    for name in _CORPUS_COUNTS:
        table.add_row(name.replace("_", " "), f"{getattr(manifest, name):,}")
    table.add_section()
    for low, high, count in inspection.histogram:
        table.add_row(f"{low}–{high - 1} tokens", f"{count:,}")
    table.add_section()
    for source, reasons in inspection.quarantined_by_source.items():
        for reason, count in reasons.items():
            table.add_row(escape(f"{source}: {reason}"), f"{count:,}")
    return table


def source_table(corpus: str, check: "SourceCheck") -> Table:
    """Return what is wrong with the sources of a corpus, by annotation file and reason."""
    urls = f", {check.by_url:,} by URL (not fetched)" if check.by_url else ""
    title = f"{corpus}: {check.rows:,} rows, {check.images:,} images{urls}"
    table = Table("source", "finding", title=title, title_justify="left")
    for heading in ("count", "repairable"):
        table.add_column(heading, justify="right")
    for (file, reason), count in sorted(check.counts().items()):
        repairable = sum(
            bool(finding.repair) for finding in check.findings if (finding.file, finding.reason) == (file, reason)
        )
        table.add_row(escape(file), escape(reason), f"{count:,}", f"{repairable:,}" if repairable else "")
    if not check.findings:
        table.add_row("", "nothing is wrong", "", "")
    return table


def replay_table(samples: "Sequence[ReplayedSample]") -> Table:
    """Return the samples of a replayed step, non-finite ones first."""
    table = Table(title="each sample of the step by itself", title_justify="left")
    for heading in ("sample", "id", "loss", "gradient norm"):
        table.add_column(heading, justify="left" if heading == "id" else "right")
    for sample in sorted(samples, key=lambda sample: sample.finite):
        table.add_row(str(sample.number), escape(sample.sample_id), f"{sample.loss:.4g}", f"{sample.grad_norm:.4g}")
    return table
