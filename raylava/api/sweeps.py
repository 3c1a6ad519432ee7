"""Run a sweep, and read its results. `raylava sweep` calls this function."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raylava.api import DEFAULT_STORAGE
from raylava.config.recipe import Recipe
from raylava.console import Console
from raylava.storage import StoragePath, writable
from raylava.tune.report import write_report
from raylava.tune.results import SweepResults
from raylava.tune.runner import SweepRun
from raylava.tune.sweep import SweepConfig, load_sweep
from raylava.tune.sweep_plan import SweepPlan, plan_of_results, plan_sweep
from raylava.tune.tables import plan_table
from raylava.tune.variants import TrialResult


@dataclass(frozen=True)
class Sweep:
    """The results of a sweep, and the folder of its report (report.html, report.md, results.csv)."""

    results: SweepResults
    trials: Sequence[TrialResult]
    folder: StoragePath

    def table(self) -> list[dict[str, Any]]:
        """Return one row per trial: levels, settings, scores, hours, as JSON-serializable values."""
        return self.results.table()

    @property
    def failed(self) -> list[TrialResult]:
        """The trials that failed; their `failure` is the reason."""
        return [trial for trial in self.trials if trial.outcome == "failed"]


def prepare_sweep(config: SweepConfig, overrides: Sequence[str], storage: StoragePath) -> tuple[SweepRun, SweepPlan]:
    """Return a sweep that is ready to run, and its plan: the stages of its variants, each with its users."""
    sweep_run = SweepRun(config, list(overrides), storage)
    return sweep_run, plan_sweep(sweep_run.planned_variants(), storage, sweep_run.inputs)


def sweep(
    file: str,
    overrides: Sequence[str] = (),
    *,
    storage: str = DEFAULT_STORAGE,
    device_hour_price: Callable[[Recipe], float | None] = lambda _: None,
    console: Console | None = None,
) -> Sweep:
    """Run every variant of a sweep, building shared stages once, and write its report.

    `file` is the file or name of a sweep; `overrides` apply to its recipe. `device_hour_price` returns the price of a
    GPU or CPU core for an hour, or None. Failed trials are part of the result. Raises UserError for a mistake in the
    sweep.
    """
    console = console or Console(sys.stderr)
    config, root, settings = load_sweep(file), writable(storage), list(overrides)
    sweep_run, plan = prepare_sweep(config, settings, root)
    if not console.quiet:
        console.show(plan_table(plan))
    price = device_hour_price(plan.variants[0].recipe)
    trials = sweep_run.run(console, price)
    finished = plan_of_results(trials, root, sweep_run.inputs)
    results = SweepResults(config, settings, finished, trials, price)
    write_report(results, sweep_run.folder)
    return Sweep(results, trials, sweep_run.folder)
