"""A sweep's tables: what is planned, where trials are, what came of them."""

import csv
import io
from typing import Any

from rich.markup import escape
from rich.table import Table

from raylava.artifacts import Artifact
from raylava.report import benchmarks
from raylava.tune.board import Where
from raylava.tune.plan import SweepPlan


def plan_table(sweep_plan: SweepPlan) -> Table:
    """Stages by kind: how often they are needed, how many are distinct, how many are there."""
    works = sweep_plan.works
    table = Table(title=f"{len(sweep_plan.variants)} variants", title_justify="left")
    for heading in ("stage", "needed", "distinct", "found", "to make"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for kind in dict.fromkeys(work.stage for work in works):
        own = [work for work in works if work.stage == kind]
        found = sum(work.found for work in own)
        needed = sum(work.users for work in own)
        table.add_row(kind, str(needed), str(len(own)), str(found), str(len(own) - found))
    return table


def progress_table(names: list[str], trials: list[Where]) -> Table:
    """A line a trial."""
    table = Table("trial", "variant", "stage", "progress", "figures")
    for number, (name, where) in enumerate(zip(names, trials, strict=True)):
        share = f"{where.done:g}/{where.total:g}" if where.total else ""
        figures = "  ".join(f"{key} {value:.4g}" for key, value in where.figures.items())
        if where.ended:
            table.add_row(str(number), escape(name), where.ended)
        else:
            table.add_row(str(number), escape(name), where.doing, share, figures)
    return table


def results(sweep_plan: SweepPlan, failures: list[str | None]) -> list[dict[str, Any]]:
    """A row a variant: its levels and seed, its scores by benchmark, its last losses and model, and why it failed."""
    rows = []
    for number, (variant, failure) in enumerate(zip(sweep_plan.variants, failures, strict=True)):
        seed = {} if variant.seed is None else {"seed": variant.seed}
        rows.append({**variant.levels, **seed, **_figures(sweep_plan.artifacts(number)), "failure": failure})
    return rows


def _figures(artifacts: dict[str, Artifact]) -> dict[str, Any]:
    figures: dict[str, Any] = {
        name: artifacts[f"evaluate {name}"].metrics["overall"]["exact_match"] for name in benchmarks(artifacts)
    }
    model = artifacts.get("finetune")
    if model is not None:
        figures |= {"final_loss": model.metrics["final_loss"], "model": str(model.place)}
    return figures


def results_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of `results`, without where the models are."""
    columns = [name for name in _columns(rows) if name != "model" and any(row.get(name) is not None for row in rows)]
    table = Table(*columns)
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    return table


def results_csv(rows: list[dict[str, Any]]) -> bytes:
    """The rows of `results` as CSV, with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else escape(str(value))
