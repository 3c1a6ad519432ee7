"""A sweep's tables on the console: what is planned, where trials are, what came of them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from raylava.tune.results import SweepResults
from raylava.tune.sweep_plan import SweepPlan
from raylava.tune.tracker import TrialStatus

_ROWS = 24  # of a table that lives: what runs, and the last that ended


def plan_table(sweep_plan: SweepPlan) -> Table:
    """Stages by kind: how often they are needed, how many are distinct, how many are there."""
    works = sweep_plan.works
    table = Table(title=f"{len(sweep_plan.variants)} trials", title_justify="left")
    for heading in ("stage", "needed", "distinct", "found", "to make"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for kind in dict.fromkeys(work.stage for work in works):
        own = [work for work in works if work.stage == kind]
        found = sum(work.found for work in own)
        needed = sum(work.users for work in own)
        table.add_row(kind, str(needed), str(len(own)), str(found), str(len(own) - found))
    return table


def progress_table(trials: Sequence[TrialStatus], now: float, expected: int | None) -> Table:
    """A line a trial: those that run, then those that ended last. `now` in seconds of the epoch; `expected` trials in
    all (None where nobody knows).
    """
    table = Table("trial", "variant", "stage", "step", "figures", "ETA")
    running = [one for one in enumerate(trials) if not one[1].ended]
    ended = [one for one in enumerate(trials) if one[1].ended]
    for number, where in sorted(running + ended[-max(0, _ROWS - len(running)) :]):
        table.add_row(str(number), escape(where.variant), *_told(where, now))
    counts = Counter(where.ended or "running" for where in trials)
    waiting = [f"{expected - len(trials)} to come"] if expected and expected > len(trials) else []
    table.caption = ", ".join([f"{count} {how}" for how, count in counts.items()] + waiting) or "starting"
    table.caption_justify = "left"
    return table


def _told(where: TrialStatus, now: float) -> list[str]:
    """Stage, step, figures, ETA."""
    if where.ended:
        return [where.ended]
    step = f"{where.done:g}/{where.total:g}" if where.total else ""
    figures = "  ".join(f"{name} {value:.4g}" for name, value in where.figures.items() if name != "wait")
    return [where.doing, step, figures, _eta(where, now)]


def _eta(where: TrialStatus, now: float) -> str:
    """Of the stage."""
    if where.since is None or where.done <= where.since[1] or now <= where.since[0]:
        return ""
    rate = (where.done - where.since[1]) / (now - where.since[0])
    seconds = (where.total - where.done) / rate
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def results_table(findings: SweepResults) -> Table:
    """A line a trial; of many, the best of each variant and those that failed."""
    chosen = {id(row) for row in findings.chosen}
    few = len(findings.rows) <= _ROWS
    shown = [row for row in findings.rows if few or id(row) in chosen or row.ended.failure]
    columns = [*findings.sweep.axes, *(["seed"] if findings.sweep.seeds else [])]
    columns += list(findings.sweep.search.space) if findings.sweep.search else []
    columns += [*findings.benchmarks, "loss", "ended"]
    table = Table(*(escape(column.rpartition(".")[2]) for column in columns))
    for row in shown:
        variant = row.ended.variant
        known = {**variant.levels, "seed": variant.seed, **variant.searched, **row.values, **row.scores}
        table.add_row(
            *(_cell(known.get(column)) for column in columns[:-1]), escape(row.ended.failure or row.ended.how)
        )
    if len(shown) < len(findings.rows):
        table.caption, table.caption_justify = f"{len(findings.rows)} trials in all, see results.csv", "left"
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else escape(str(value))
