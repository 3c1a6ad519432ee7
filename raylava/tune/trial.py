"""One trial: runs the stages of a variant inside a Ray Tune trial.

The trial itself reserves no CPU and no GPU; its stages request their own resources. A stage that another trial is
building is waited for, not built twice (stage.run_stage). An exception is reported as the trial's result, so that Ray
Tune restarts only trials whose process died.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray import tune

from raylava.artifacts import Artifact
from raylava.cluster.session import configure_ray_libraries
from raylava.config.recipe import Recipe
from raylava.errors import first_line
from raylava.pipeline.graph import InputCache, build_stages
from raylava.pipeline.results import headline_score, scored_benchmarks
from raylava.pipeline.stage import run_stage
from raylava.progress import NullProgressBar, ProgressBar
from raylava.storage import storage_path
from raylava.train.step_log import training_seconds
from raylava.tune.prefixes import with_prefixes
from raylava.tune.study import RUNGS
from raylava.tune.variants import LOSS, SECONDS

logger = logging.getLogger(__name__)

_REPORT_INTERVAL_SECONDS = 0.5
TRAINING_STAGES = ("pretrain", "finetune")
_COMPARED_STAGE = "finetune"  # the stage whose loss is compared between trials


def run_trial(config: dict[str, Any]) -> None:
    """Run one trial: the trainable of Ray Tune.

    `config` holds the number of the `trial`, the `storage` URI, the `tracker` actor, whether the sweep `joined` a
    running cluster, whether the trial belongs to a `search`, what the driver has resolved of the corpora's `sources`,
    and the fingerprints of training stages that are `extended` by others (see prefixes.py). Trials of a search report
    `rung` and `loss` during finetuning. Every trial ends with a report of its `objective/NAME` values or of its
    `failure`.
    """
    configure_ray_libraries(config["joined"])
    tracker, number = config["tracker"], config["trial"]
    recipe, *providers = map(Recipe.model_validate_json, ray.get(tracker.recipes.remote(number)))
    reporter = _TrialReporter(tracker, number, compare_loss=config["search"])
    try:
        storage, inputs = storage_path(config["storage"]), InputCache(config["sources"])
        provided = [build_stages(provider, storage, inputs) for provider in providers]
        stages = with_prefixes(build_stages(recipe, storage, inputs), provided, config["extended"])
        artifacts = {stage.label: run_stage(stage, reporter) for stage in stages}
        report: dict[str, Any] = {"objective": compute_objectives(artifacts)}
    except Exception as error:  # any error of the stages is the result of this variant
        logger.exception("the trial failed")
        report = {"failure": first_line(error)}
    ray.get(tracker.finish.remote(number, "failed" if "failure" in report else "done"))
    tune.report(report)


def compute_objectives(artifacts: Mapping[str, Artifact]) -> dict[str, float]:
    """Return every objective of a finished variant by name: the final loss, training seconds, benchmark scores."""
    scores = {name: headline_score(artifacts[f"evaluate {name}"]) for name in scored_benchmarks(artifacts)}
    trained = [artifact for artifact in artifacts.values() if artifact.stage in TRAINING_STAGES]
    seconds = sum(training_seconds(artifact.path, artifact) for artifact in trained)
    return {LOSS: artifacts["finetune"].metrics["final_loss"], SECONDS: seconds} | scores


class _TrialReporter:
    """Progress reporter (progress.ProgressReporter) that forwards the progress of stages to the tracker."""

    def __init__(self, tracker: Any, trial: int, compare_loss: bool) -> None:
        self._tracker, self._trial, self._compare_loss = tracker, trial, compare_loss

    def say(self, text: str) -> None:
        """Discard the line: a trial has no console, and its results are in the artifacts."""

    @contextmanager
    def stage(self, title: str, unit: str) -> Iterator[ProgressBar]:
        self._tracker.start_stage.remote(self._trial, title)
        rungs = Rungs() if self._compare_loss and title == _COMPARED_STAGE else None
        yield _TrackerBar(self._tracker, self._trial, rungs)


class _TrackerBar(NullProgressBar):
    """Progress bar that reports to the tracker at most every half second, and to Ray Tune at each rung."""

    def __init__(self, tracker: Any, trial: int, rungs: "Rungs | None") -> None:
        self._tracker, self._trial, self._rungs = tracker, trial, rungs
        self._last_report = 0.0

    def update(self, done: float, total: float, **metrics: float) -> None:
        """See progress.ProgressBar."""
        if time.monotonic() - self._last_report >= _REPORT_INTERVAL_SECONDS or done == total:
            self._last_report = time.monotonic()
            self._tracker.report_progress.remote(self._trial, done, total, metrics, time.time())
        reached = self._rungs.record_loss(done, total, metrics["loss"]) if self._rungs else None
        if reached:
            tune.report({"rung": reached[0], "loss": reached[1]})


class Rungs:
    """Divides the steps of a training stage into RUNGS equal parts and computes the mean loss of each."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._done = 0.0

    def record_loss(self, done: float, total: float, loss: float) -> tuple[int, float] | None:
        """Record the loss of step `done` of `total` (1-based, in order); steps repeated after a restart are ignored.

        Returns (rung, mean loss since the previous rung) when the step completes a rung (1 to RUNGS), else None. Steps
        that were skipped, whose loss is not finite, are left out of the mean.
        """
        if done <= self._done:
            return None
        self._done = done
        if math.isfinite(loss):
            self._losses.append(loss)
        rung = int(RUNGS * done // total)
        if rung == int(RUNGS * (done - 1) // total):
            return None
        if not self._losses:
            return None
        mean = sum(self._losses) / len(self._losses)
        self._losses = []
        return rung, mean
