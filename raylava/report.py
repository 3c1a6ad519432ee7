"""What a run ends with: the table of scores beside their baselines, where the model is, and what to try next."""

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from raylava.artifacts import Artifact
from raylava.console import Console
from raylava.corpus.inspect import Inspection

if TYPE_CHECKING:
    from raylava.train.replay import Replayed

_EVALUATE = "evaluate "


def summary(artifacts: dict[str, Artifact]) -> dict[str, Any]:
    """Stage → fingerprint, path, metrics: the JSON of a run."""
    return {
        label: {"fingerprint": artifact.fingerprint, "path": str(artifact.place), "metrics": artifact.metrics}
        for label, artifact in artifacts.items()
    }


def closing(artifacts: dict[str, Artifact], console: Console) -> None:
    """Show the scores, the quarantine's counts, and the commands a person may want next."""
    for name in benchmarks(artifacts):
        console.show(score_table(name, artifacts))
    for label, artifact in artifacts.items():
        if artifact.metrics.get("quarantined"):
            reasons = ", ".join(f"{count} {reason}" for reason, count in artifact.metrics["quarantine"].items())
            console.say(f"[yellow]set aside[/] in {label}: {reasons}  [dim]{artifact.place}/quarantine.csv[/]")
    model = artifacts["finetune"].place
    console.say(f"\nmodel: [bold]{escape(str(model))}[/]   (loads in plain transformers)")
    console.say(f'next:  raylava chat {escape(str(model))} --image FILE "What do you see?"')
    console.say(f"       raylava show {escape(str(model))}")


def benchmarks(artifacts: dict[str, Artifact]) -> list[str]:
    """Names of the benchmarks that were answered by the trained model."""
    labels = [label.removeprefix(_EVALUATE) for label in artifacts if label.startswith(_EVALUATE)]
    return [label for label in labels if not label.endswith(")")]


def score_table(name: str, artifacts: dict[str, Artifact]) -> Table:
    """Exact match by question type: the model, its baselines, and the best constant answer."""
    columns = {"model": artifacts[_EVALUATE + name].metrics}
    for baseline, title in (("blank", "blank pictures"), ("untrained", "before training")):
        artifact = artifacts.get(f"{_EVALUATE}{name} ({baseline})")
        if artifact is not None:
            columns[title] = artifact.metrics
    table = Table(title=f"{name}: share of answers that match exactly", title_justify="left")
    table.add_column("question type")
    table.add_column("questions", justify="right")
    for title in columns:
        table.add_column(title, justify="right")
    table.add_column("majority answer", justify="right")
    for category in columns["model"]["by_category"]:
        _add_row(table, category, [column["by_category"][category] for column in columns.values()])
    table.add_section()
    _add_row(table, "all", [column["overall"] for column in columns.values()])
    return table


def _add_row(table: Table, title: str, scores: list[dict[str, Any]]) -> None:
    figures = [f"{score['exact_match']:.2f}" for score in scores]
    table.add_row(title, str(scores[0]["questions"]), *figures, f"{scores[0]['majority']:.2f}")


def corpus_table(inspection: Inspection) -> Table:
    """A prepared corpus in figures: rows, tokens, lengths, and what was set aside by source and reason."""
    manifest = inspection.manifest
    table = Table("figure", title="prepared corpus", title_justify="left")
    table.add_column("value", justify="right")
    for name in ("rows_in", "rows", "trimmed", "quarantined", "images", "tokens", "supervised_tokens"):
        table.add_row(name.replace("_", " "), f"{getattr(manifest, name):,}")
    table.add_section()
    for low, high, count in inspection.histogram:
        table.add_row(f"{low}–{high - 1} tokens", f"{count:,}")
    table.add_section()
    for source, reasons in inspection.quarantined_by_source.items():
        for reason, count in reasons.items():
            table.add_row(f"{escape(source)}: {reason}", f"{count:,}")
    return table


def replay_table(samples: "list[Replayed]") -> Table:
    """The samples of a replayed step, those that are not finite first."""
    table = Table(title="each sample of the step, alone", title_justify="left")
    for heading in ("sample", "id", "loss", "gradient norm"):
        table.add_column(heading, justify="left" if heading == "id" else "right")
    for one in sorted(samples, key=lambda sample: sample.finite):
        table.add_row(str(one.number), escape(one.sample_id), f"{one.loss:.4g}", f"{one.gradient_norm:.4g}")
    return table
