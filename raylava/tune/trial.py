"""One trial: a variant's stages, walked within a Ray Tune trial. Holds no CPU and no GPU: its stages ask for their own.

A stage that another trial is building is waited for, not built twice (stages.make). An error of the trial's own is its
result, so that Tune starts only those again whose process was lost.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray import tune

from raylava.artifacts import Artifact
from raylava.cli.tables import benchmarks, headline
from raylava.cluster.session import silence_ray_logs
from raylava.config.recipe import Recipe
from raylava.console import ProgressBar
from raylava.errors import first_line
from raylava.pipeline.stage import run_stage
from raylava.pipeline.stages import stages_of
from raylava.storage import storage_path
from raylava.train.metrics_logger import training_seconds
from raylava.tune.study import RUNGS
from raylava.tune.variants import LOSS, SECONDS

logger = logging.getLogger(__name__)

_TELL_EVERY_SECONDS = 0.5
_COMPARED = "finetune"  # the stage whose loss is compared between trials


def run_trial(config: dict[str, Any]) -> None:
    """Ray Tune's trainable. `config` holds the trial's number, the storage, the board; `search`: whether it is of one.

    Reports `mark` and `loss` on the way when it is of a search, then `objective/NAME`s or `failure`.
    """
    silence_ray_logs()
    board, number = config["board"], config["trial"]
    recipe = Recipe.model_validate_json(ray.get(board.recipe.remote(number)))
    teller = _TrialReporter(board, number, compared=config["search"])
    try:
        made = {stage.label: run_stage(stage, teller) for stage in stages_of(recipe, storage_path(config["storage"]))}
        told: dict[str, Any] = {"objective": objectives(made)}
    except Exception as error:  # whatever it is, it is this variant's result
        logger.exception("the trial failed")
        told = {"failure": first_line(error)}
    ray.get(board.end.remote(number, "failed" if "failure" in told else "done"))
    tune.report(told)


def objectives(artifacts: Mapping[str, Artifact]) -> dict[str, float]:
    """All that a search may rank_candidates of a finished variant, by name."""
    scores = {name: headline(artifacts[f"evaluate {name}"]) for name in benchmarks(artifacts)}
    trained = [one for one in artifacts.values() if one.stage in ("pretrain", "finetune")]
    seconds = sum(training_seconds(one.path, one) for one in trained)
    return {LOSS: artifacts["finetune"].metrics["final_loss"], SECONDS: seconds} | scores


class _TrialReporter:
    """What a stage shows, told to the board (console.Shows)."""

    def __init__(self, board: Any, trial: int, compared: bool) -> None:
        self._board, self._trial, self._compared = board, trial, compared

    def say(self, text: str) -> None:
        """Nobody reads a trial's lines: what was made is in the artifacts."""

    @contextmanager
    def stage(self, title: str, unit: str) -> Iterator[ProgressBar]:
        self._board.start.remote(self._trial, title)
        yield _TrackerBar(self._board, self._trial, Rungs() if self._compared and title == _COMPARED else None)


class _TrackerBar:
    """To the board not more often than someone looks; to Tune at each mark."""

    def __init__(self, board: Any, trial: int, marks: "Rungs | None") -> None:
        self._board, self._trial, self._marks = board, trial, marks
        self._told = 0.0

    def update(self, done: float, total: float, **figures: float) -> None:
        """See console.ProgressBar."""
        if time.monotonic() - self._told >= _TELL_EVERY_SECONDS or done == total:
            self._told = time.monotonic()
            self._board.tell.remote(self._trial, done, total, figures, time.time())
        reached = self._marks.saw(done, total, figures["loss"]) if self._marks else None
        if reached:
            tune.report({"mark": reached[0], "loss": reached[1]})


class Rungs:
    """Cuts a training into RUNGS equal parts: the mean loss of each, once it is over."""

    def __init__(self) -> None:
        self._losses: list[float] = []

    def saw(self, done: float, total: float, loss: float) -> tuple[int, float] | None:
        """A step is done, each once and in order. The mark (1 to RUNGS) that it reached and the mean, if it did."""
        self._losses.append(loss)
        mark = int(RUNGS * done // total)
        if mark == int(RUNGS * (done - 1) // total):
            return None
        mean = sum(self._losses) / len(self._losses)
        self._losses = []
        return mark, mean
