"""A Ray actor that holds the status of every trial of a sweep: trials report to it, the driver reads it."""

from dataclasses import dataclass, field

import ray


@dataclass
class TrialStatus:
    """Progress of one trial.

    `done` of `total` units of `stage` are complete; `metrics` are its latest. `built_stages` are the stages that
    this trial built itself rather than reused. `outcome` is done, stopped (early) or failed, and None while the trial
    runs. `first_report` is the (Unix time in seconds, units done) of the stage's first progress report, from
    which its rate is computed.
    """

    variant: str
    stage: str = "starting"
    done: float = 0.0
    total: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    built_stages: list[str] = field(default_factory=list)
    outcome: str | None = None
    first_report: tuple[float, float] | None = None


@ray.remote(num_cpus=0)
class TrialTracker:
    """Holds the status and the recipe of each trial, by the trial's number."""

    def __init__(self) -> None:
        self._trials: list[TrialStatus] = []
        self._recipes: list[list[str]] = []

    def add_trial(self, variant: str, recipes: list[str]) -> int:
        """Register a trial with its variant's name and return the trial's number.

        `recipes` are, as JSON, its own and those of the variants with shorter stages that it continues from.
        """
        self._trials.append(TrialStatus(variant))
        self._recipes.append(recipes)
        return len(self._trials) - 1

    def recipes(self, trial: int) -> list[str]:
        """Return the trial's recipes as `add_trial` got them."""
        return self._recipes[trial]

    def start_stage(self, trial: int, stage: str) -> None:
        """Record that a trial builds a stage that does not exist yet and that no other trial is building."""
        status = self._trials[trial]
        status.stage, status.done, status.total, status.metrics, status.first_report = stage, 0.0, 0.0, {}, None
        status.built_stages.append(stage)

    def report_progress(self, trial: int, done: float, total: float, metrics: dict[str, float], at: float) -> None:
        """Record the progress of the trial's current stage; `at` is the Unix time of the report in seconds."""
        status = self._trials[trial]
        status.done, status.total, status.metrics = done, total, metrics
        status.first_report = status.first_report or (at, done)

    def finish(self, trial: int, outcome: str) -> None:
        """Record the outcome of a trial: done, stopped or failed."""
        self._trials[trial].outcome = outcome

    def statuses(self) -> list[TrialStatus]:
        """Return the status of all trials, in the order in which they started."""
        return self._trials
