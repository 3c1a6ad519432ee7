"""The driver's side of a sweep: Ray Tune over its variants, a table that lives, and who failed why.

The artifacts are the sweep's memory: run again, what is finished is found, what was under way goes on from its
checkpoints, and Tune's own state is not needed.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayTaskError

from raylava.console import Console, meanwhile
from raylava.errors import first_line
from raylava.recipe import Resources
from raylava.session import here, ray_session
from raylava.storage import Place
from raylava.tune.board import Board
from raylava.tune.plan import SweepPlan
from raylava.tune.table import progress_table
from raylava.tune.trial import run_trial


@dataclass(frozen=True)
class Ended:
    """How a trial ended: the stages that it made itself (the others it found), and why it failed."""

    made: tuple[str, ...]
    failure: str | None


def run_sweep(sweep_plan: SweepPlan, storage: Place, most: int | None, console: Console) -> list[Ended]:
    """Make what is missing of every variant. Returns how each ended, in their order.

    `most` bounds how many are trained at once.
    """
    resources = [variant.recipe.resources for variant in sweep_plan.variants]
    largest = max(resources, key=lambda one: one.workers * one.cpus_per_worker)
    with ray_session(largest):
        at_once = concurrent_trials(resources, ray.cluster_resources())
        return _tune(sweep_plan, storage, min(at_once, most or at_once), console)


def concurrent_trials(wanted: list[Resources], cluster: dict[str, float]) -> int:
    """How many trials the cluster can train at once, when each takes what the hungriest does; at least one."""
    cpus = max(one.workers * one.cpus_per_worker for one in wanted)
    gpus = max(one.workers * one.gpus_per_worker for one in wanted)
    fits = int(cluster.get("CPU", 0) // cpus)
    if gpus:
        fits = min(fits, int(cluster.get("GPU", 0) // gpus))
    return max(1, fits)


def _tune(sweep_plan: SweepPlan, storage: Place, at_once: int, console: Console) -> list[Ended]:
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    count = len(sweep_plan.variants)
    board = Board.options(scheduling_strategy=here()).remote(count)  # type: ignore[attr-defined]
    configs = [
        {"trial": number, "recipe": variant.recipe, "storage": storage.uri, "board": board}
        for number, variant in enumerate(sweep_plan.variants)
    ]
    with tempfile.TemporaryDirectory(prefix="raylava-tune-") as folder, _shown(board, sweep_plan, console):
        results = tune.Tuner(
            tune.with_resources(_by_number, {"cpu": 0, "memory": 1}),  # a byte: Tune will have something reserved
            param_space={"configs": configs, "number": tune.grid_search(list(range(count)))},
            tune_config=tune.TuneConfig(max_concurrent_trials=at_once),
            run_config=tune.RunConfig(storage_path=folder, name="sweep", verbose=0),
        ).fit()
        made = [where.made for where in ray.get(board.look.remote())]
    failures = {result.config["number"]: _reason(result.error) for result in results if result.config and result.error}
    return [Ended(tuple(own), failures.get(number)) for number, own in enumerate(made)]


def _by_number(config: dict[str, Any]) -> None:
    run_trial(config["configs"][config["number"]])


def _reason(error: Exception) -> str:
    """The trial's own error rather than Ray's wrapping of it."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return first_line(cause)


@contextmanager
def _shown(board: Any, sweep_plan: SweepPlan, console: Console) -> Iterator[None]:
    """Keep the table in front of the person while Tune blocks."""
    names = [variant.name for variant in sweep_plan.variants]
    with console.live(lambda: progress_table(names, ray.get(board.look.remote()))) as refresh, meanwhile(refresh):
        yield
