"""What a run ends with: the table of scores beside their baselines, where the model is, and what to try next."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from raylava.artifacts import Artifact
from raylava.console import Console
from raylava.corpus.inspect import Inspection

if TYPE_CHECKING:
    from raylava.cluster.placement import Placement
    from raylava.config.recipe import Recipe
    from raylava.evaluate.compare import Comparison
    from raylava.pipeline.status import ArtifactStatus
    from raylava.train.replay import ReplayedSample

_EVALUATE = "evaluate "


def summary(artifacts: dict[str, Artifact]) -> dict[str, Any]:
    """Stage → fingerprint, path, metrics: the JSON of a run."""
    return {
        label: {"fingerprint": artifact.fingerprint, "path": str(artifact.path), "metrics": artifact.metrics}
        for label, artifact in artifacts.items()
    }


def closing(artifacts: dict[str, Artifact], console: Console) -> None:
    """Show the scores, the quarantine's counts, and the commands a person may want next."""
    for name in benchmarks(artifacts):
        console.show(score_table(name, artifacts))
    for label, artifact in artifacts.items():
        if artifact.metrics.get("quarantined"):
            reasons = ", ".join(f"{count} {reason}" for reason, count in artifact.metrics["quarantine"].items())
            console.say(f"[yellow]set aside[/] in {label}: {reasons}  [dim]{artifact.path}/quarantine.csv[/]")
    for name in _answered(artifacts):
        if not _is_scored(artifacts[_EVALUATE + name]):
            tell_unjudged(artifacts[_EVALUATE + name], console)
    if "finetune" not in artifacts:
        return
    model = artifacts["finetune"].path
    console.say(f"\nmodel: [bold]{escape(str(model))}[/]   (loads in plain transformers)")
    console.say(f'next:  raylava chat {escape(str(model))} --image FILE "What do you see?"')
    console.say(f"       raylava show {escape(str(model))}")


def tell_unjudged(evaluation: Artifact, console: Console) -> None:
    """TrialStatus the answers are that wait for a judge, and what scores its grades."""
    name, answers = evaluation.metrics["benchmark"], evaluation.path / evaluation.metrics["answers_for_a_judge"]
    console.say(f"answers to {name}: [bold]{escape(str(answers))}[/]   (for a judge to grade)")
    console.say("next:  raylava score mm-vet --data DIR --grades FILE")


def benchmarks(artifacts: Mapping[str, Artifact]) -> list[str]:
    """Names of the benchmarks that were answered by the trained model and have a score."""
    return [name for name in _answered(artifacts) if _is_scored(artifacts[_EVALUATE + name])]


def _answered(artifacts: Mapping[str, Artifact]) -> list[str]:
    labels = [label.removeprefix(_EVALUATE) for label in artifacts if label.startswith(_EVALUATE)]
    return [label for label in labels if not label.endswith(")")]


def _is_scored(evaluation: Artifact) -> bool:
    return "figures" in evaluation.metrics


def headline(evaluation: Artifact) -> float:
    """The figure that an evaluation is known by."""
    return float(evaluation.metrics["figures"][evaluation.metrics["headline"]]["value"])


def score_table(name: str, artifacts: dict[str, Artifact]) -> Table:
    """The headline by question type: the model with its 95 % interval, its baselines, and the best constant answer."""
    columns = {"model": artifacts[_EVALUATE + name].metrics}
    for baseline, title in (("blank", "blank images"), ("untrained", "before training")):
        artifact = artifacts.get(f"{_EVALUATE}{name} ({baseline})")
        if artifact is not None:
            columns[title] = artifact.metrics
    model = columns["model"]
    figure, majority = model["headline"], model.get("majority")
    table = Table(title=f"{name}: {figure.replace('_', ' ')} ({model['protocol']})", title_justify="left")
    table.add_column("question type")
    for title in ("questions", *columns, *(["majority answer"] if majority else [])):
        table.add_column(title, justify="right")
    for category, figures in model["by_category"].items():
        scores = [_of_category(column, category) for column in columns.values()]
        _add_row(table, escape(category), figures["units"], scores + ([majority[category]] if majority else []))
    table.add_section()
    scores = [column["figures"][figure]["value"] for column in columns.values()]
    _add_row(table, "all", model["questions"], scores + ([majority["all"]] if majority else []))
    interval = model["figures"][figure]
    table.caption = f"the model's 95 % interval: {interval['low']:.2f} to {interval['high']:.2f}"
    table.caption_justify = "left"
    return table


def _of_category(metrics: dict[str, Any], category: str) -> float:
    """The headline of a category, or the figure that it has of its own."""
    figures = metrics["by_category"][category]
    own = [name for name in figures if name != "units"]
    return float(figures[metrics["headline"] if metrics["headline"] in figures else own[0]])


def _add_row(table: Table, title: str, questions: float, scores: list[float]) -> None:
    table.add_row(title, f"{questions:.0f}", *(f"{score:.2f}" for score in scores))


def result_table(metrics: dict[str, Any]) -> Table:
    """One benchmark's figures: over all with 95 % intervals, then each category's. `metrics` as of Result.metrics."""
    title = f"{metrics['benchmark']}: {metrics['questions']:,} questions, {metrics['missing']:,} without an answer "
    table = Table(title=f"{title}(protocol {metrics['protocol']})", title_justify="left")
    table.add_column("")
    for name in metrics["figures"]:
        table.add_column(name.replace("_", " "), justify="right")
    cells = [f"{one['value']:.4g} [dim]{one['low']:.4g}–{one['high']:.4g}[/]" for one in metrics["figures"].values()]
    table.add_row("all", *cells)
    if len(metrics["by_category"]) > 1:
        table.add_section()
        for category, figures in metrics["by_category"].items():
            shown = [figures.get(name) for name in metrics["figures"]]
            shown = shown if any(one is not None for one in shown) else [_of_category(metrics, category)]
            table.add_row(escape(category), *("" if one is None else f"{one:.4g}" for one in shown))
    return table


def comparison_table(comparison: "Comparison") -> Table:
    """Each evaluation's mean credit, and its difference to the first with a 95 % interval."""
    apart = sum(asked.parts for asked in comparison.asked)
    title = f"{comparison.benchmark}: {len(comparison.asked):,} questions, on {apart:,} of which they part"
    table = Table("model", title=title, title_justify="left")
    for heading in ("mean credit", "difference", "95 % interval"):
        table.add_column(heading, justify="right")
    differences = {one.name: one for one in comparison.differences}
    for name, mean in comparison.credit.items():
        one = differences.get(name)
        told = (f"{one.difference:+.3f}", f"{one.low:+.3f} to {one.high:+.3f}") if one else ("", "")
        table.add_row(escape(name), f"{mean:.3f}", *told)
    return table


def needs_table(recipe: "Recipe", found: "Sequence[Placement]", storage: str) -> Table:
    """What a recipe wants of a cluster, beside what there is and what there may be."""
    table = Table("stage", "wants", title=f"{recipe.name} on this cluster", title_justify="left")
    for heading in ("fit now", "fit in time", "nodes"):
        table.add_column(heading, justify="right")
    for one in found:
        later = "not known" if one.fits_eventually is None else f"{one.fits_eventually:,}"
        row = (
            ", ".join(one.request.stages),
            one.request.description,
            f"{one.fits_now:,}",
            later,
            f"{one.nodes or '':}",
        )
        table.add_row(*row, style="red" if one.is_impossible else None)
    shared = "a bucket, reached by every node" if "://" in storage else "a folder: every node must mount it"
    table.caption = f"storage: {storage} ({shared}); up to {recipe.resources.cache_gb:g} GB of cache on a training node"
    table.caption_justify = "left"
    return table


def status_table(found: "Sequence[ArtifactStatus]") -> Table:
    """Artifacts, made and being made, in the order of their stages."""
    table = Table("stage", "artifact", "state", "", "when (UTC)", title="in storage", title_justify="left")
    styles = {"made": "green", "building": "yellow", "stopped": "red"}
    for one in found:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(one.at)) if one.at else ""
        table.add_row(one.stage, one.fingerprint, f"[{styles[one.state]}]{one.state}[/]", one.detail, when)
    return table


def corpus_table(inspection: Inspection) -> Table:
    """A prepared corpus in figures: rows, tokens, lengths, and what was set aside by source and reason."""
    manifest = inspection.manifest
    table = Table("figure", title="prepared corpus", title_justify="left")
    table.add_column("value", justify="right")
    for name in ("rows_in", "rows", "trimmed", "quarantined", "images", "tokens", "loss_tokens"):
        table.add_row(name.replace("_", " "), f"{getattr(manifest, name):,}")
    table.add_section()
    for low, high, count in inspection.histogram:
        table.add_row(f"{low}–{high - 1} tokens", f"{count:,}")
    table.add_section()
    for source, reasons in inspection.quarantined_by_source.items():
        for reason, count in reasons.items():
            table.add_row(f"{escape(source)}: {reason}", f"{count:,}")
    return table


def replay_table(samples: "list[ReplayedSample]") -> Table:
    """The samples of a replayed step, those that are not finite first."""
    table = Table(title="each sample of the step, alone", title_justify="left")
    for heading in ("sample", "id", "loss", "gradient norm"):
        table.add_column(heading, justify="left" if heading == "id" else "right")
    for one in sorted(samples, key=lambda sample: sample.finite):
        table.add_row(str(one.number), escape(one.sample_id), f"{one.loss:.4g}", f"{one.grad_norm:.4g}")
    return table
