"""Display the results of a run: scores beside their baselines, quarantine counts, the model's location."""

from collections.abc import Mapping

from rich.table import Table

from raylava.artifacts import Artifact
from raylava.console import Console, escape
from raylava.pipeline.results import (
    EVALUATE_PREFIX,
    answered_benchmarks,
    category_score,
    is_scored,
    scored_benchmarks,
)

_BASELINES = (("blank", "blank images"), ("untrained", "before training"))


def show_results(artifacts: Mapping[str, Artifact], console: Console) -> None:
    """Display scores, quarantine counts and the commands to use the model."""
    for name in scored_benchmarks(artifacts):
        console.show(score_table(name, artifacts))
    for label, artifact in artifacts.items():
        if artifact.metrics.get("quarantine"):
            reasons = escape(", ".join(f"{count} {reason}" for reason, count in artifact.metrics["quarantine"].items()))
            kind = "quarantined" if artifact.metrics["quarantined"] else "filtered"
            console.say(f"[yellow]{kind}[/] in {label}: {reasons}  [dim]{escape(str(artifact.path))}/quarantine.csv[/]")
    for name in answered_benchmarks(artifacts):
        if not is_scored(artifacts[EVALUATE_PREFIX + name]):
            show_unjudged(artifacts[EVALUATE_PREFIX + name], console)
    if "finetune" not in artifacts:
        return
    model = artifacts["finetune"].path
    console.show(f"\nmodel: [bold]{escape(str(model))}[/]   (loads in plain transformers)")
    console.say(f'next:  raylava chat {escape(str(model))} --image FILE "What do you see?"')
    console.say(f"       raylava show {escape(str(model))}")


def show_unjudged(evaluation: Artifact, console: Console) -> None:
    """Display where the answers are that a judge has to grade, and the command that scores its grades."""
    name, answers = evaluation.metrics["benchmark"], evaluation.path / evaluation.metrics["answers_for_a_judge"]
    console.show(f"answers to {name}: [bold]{escape(str(answers))}[/]   (to be graded by a judge)")
    official = evaluation.metrics.get("official", "NAME")  # absent from artifacts of version 0.1.0
    console.say(f"next:  raylava score {official} --data DIR --grades FILE")


def score_table(name: str, artifacts: Mapping[str, Artifact]) -> Table:
    """Return the headline metric by category for the model, its baselines and the majority answer, with an interval."""
    columns = {"model": artifacts[EVALUATE_PREFIX + name].metrics}
    for baseline, title in _BASELINES:
        artifact = artifacts.get(f"{EVALUATE_PREFIX}{name} ({baseline})")
        if artifact is not None:
            columns[title] = artifact.metrics
    model = columns["model"]
    headline, majority = model["headline"], model.get("majority")
    table = Table(title=f"{name}: {headline.replace('_', ' ')} ({model['protocol']})", title_justify="left")
    table.add_column("question type")
    for title in ("questions", *columns, *(["majority answer"] if majority else [])):
        table.add_column(title, justify="right")
    for category, scores in model["by_category"].items():
        values = [category_score(metrics, category) for metrics in columns.values()]
        _add_row(table, escape(category), scores["units"], values + ([majority[category]] if majority else []))
    table.add_section()
    values = [metrics["scores"][headline]["value"] for metrics in columns.values()]
    _add_row(table, "all", model["questions"], values + ([majority["all"]] if majority else []))
    interval = model["scores"][headline]
    table.caption = f"the model's 95 % interval: {interval['low']:.2f} to {interval['high']:.2f}"
    table.caption_justify = "left"
    return table


def _add_row(table: Table, title: str, questions: float, values: list[float | None]) -> None:
    table.add_row(title, f"{questions:.0f}", *("" if value is None else f"{value:.2f}" for value in values))
