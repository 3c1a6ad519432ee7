"""Terminal tables of a sweep: its plan, the progress of its trials, its results."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from raylava.console import escape
from raylava.progress import format_duration, format_metric, format_number
from raylava.tune.results import SweepResults
from raylava.tune.sweep_plan import SweepPlan
from raylava.tune.tracker import TrialStatus

_MAX_ROWS = 24  # rows of the progress table, and trials up to which the results table lists all


def plan_table(sweep_plan: SweepPlan) -> Table:
    """Return, for each kind of stage, how many the trials need, how many are distinct, cached and left to build."""
    stages = sweep_plan.planned_stages
    table = Table(title=f"{len(sweep_plan.variants)} trials", title_justify="left")
    for heading in ("stage", "needed", "distinct", "cached", "to build"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for kind in dict.fromkeys(stage.stage for stage in stages):
        distinct = [stage for stage in stages if stage.stage == kind]
        cached = sum(stage.is_cached for stage in distinct)
        needed = sum(stage.users for stage in distinct)
        table.add_row(kind, str(needed), str(len(distinct)), str(cached), str(len(distinct) - cached))
    return table


def progress_table(trials: Sequence[TrialStatus], now: float, planned_trials: int | None) -> Table:
    """Return one row per running trial, followed by the trials that finished most recently.

    `now` is Unix time in seconds; `planned_trials` is the total number of trials, None if unknown.
    """
    table = Table("trial", "variant", "stage", "step", "metrics", "time left")
    running = [(number, status) for number, status in enumerate(trials) if not status.outcome]
    finished = [(number, status) for number, status in enumerate(trials) if status.outcome]
    for number, status in sorted(running + finished[-max(0, _MAX_ROWS - len(running)) :]):
        table.add_row(str(number), escape(status.variant), *_progress_cells(status, now))
    counts = Counter(status.outcome or "running" for status in trials)
    captions = [f"{count} {outcome}" for outcome, count in counts.items()]
    if planned_trials and planned_trials > len(trials):
        captions.append(f"{planned_trials - len(trials)} pending")
    table.caption = ", ".join(captions) or "starting"
    table.caption_justify = "left"
    return table


def trial_states(trials: Sequence[TrialStatus]) -> dict[str, str]:
    """Return the outcome of each trial or the stage that it builds, by the trial's number and variant."""
    return {
        f"trial {number} ({status.variant})" if status.variant else f"trial {number}": status.outcome or status.stage
        for number, status in enumerate(trials)
    }


def _progress_cells(status: TrialStatus, now: float) -> list[str]:
    """Return the cells stage, step, metrics and time left; of a finished trial only its outcome."""
    if status.outcome:
        return [status.outcome]
    step = f"{format_number(status.done)}/{format_number(status.total)}" if status.total else ""
    metrics = "  ".join(format_metric(name, value) for name, value in status.metrics.items())
    return [status.stage, step, metrics, _eta(status, now)]


def _eta(status: TrialStatus, now: float) -> str:
    """Return the remaining time of the current stage, empty if unknown."""
    if status.first_report is None:
        return ""
    first_time, first_done = status.first_report
    if status.done <= first_done or now <= first_time:
        return ""
    rate = (status.done - first_done) / (now - first_time)
    return format_duration((status.total - status.done) / rate)


def results_table(results: SweepResults) -> Table:
    """Return one row per trial; of a long list only the best trial of each variant and those that failed."""
    best_rows = {id(row) for row in results.best_rows}
    list_all = len(results.rows) <= _MAX_ROWS
    rows = [row for row in results.rows if list_all or id(row) in best_rows or row.trial.failure]
    columns = [*results.sweep.axes, *(["seed"] if results.sweep.seeds else [])]
    columns += list(results.sweep.search.space) if results.sweep.search else []
    columns += [*results.benchmarks, "loss", "outcome"]
    table = Table(*(escape(column.rpartition(".")[2]) for column in columns))
    for row in rows:
        variant = row.trial.variant
        values = {**variant.levels, "seed": variant.seed, **variant.searched, **row.objectives, **row.scores}
        cells = [_cell(values.get(column)) for column in columns[:-1]]
        table.add_row(*cells, escape(row.trial.failure or row.trial.outcome))
    if len(rows) < len(results.rows):
        table.caption, table.caption_justify = f"{len(results.rows)} trials in total, see results.csv", "left"
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else escape(str(value))
