"""Results of a sweep, read from its artifacts: one row per trial, effects of levels, device-hours."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raylava.artifacts import Artifact
from raylava.evaluation.compare import PER_QUESTION_SCORES
from raylava.pipeline.results import device_hours_per_second, headline_score, scored_benchmarks
from raylava.train.step_log import recorded_steps, training_seconds
from raylava.tune.effects import Effect, GradedVariant, estimate_effects
from raylava.tune.sweep import SweepConfig
from raylava.tune.sweep_plan import SweepPlan
from raylava.tune.trial import TRAINING_STAGES, compute_objectives
from raylava.tune.variants import TrialResult

_EVALUATE = "evaluate "
_CURVE_POINTS = 60


@dataclass(frozen=True)
class TrialRow:
    """One trial with its artifacts by stage label, its scores by benchmark and its objectives by name.

    `device_hours` are the device-hours (GPUs, or CPU cores without GPUs) of training of all stages that the trial
    needs. `shared_device_hours` divides the device-hours of each stage by the number of trials that use it.
    """

    trial: TrialResult
    artifacts: Mapping[str, Artifact]
    scores: Mapping[str, float]
    objectives: Mapping[str, float]
    device_hours: float
    shared_device_hours: float

    @property
    def levels(self) -> tuple[str, ...]:
        """Return the variant's level of each axis, in the order of the axes."""
        return tuple(self.trial.variant.levels.values())


@dataclass(frozen=True)
class SweepResults:
    """A sweep that has run. Rows are in the order of the trials; `price` is that of a device-hour, None if unknown."""

    sweep: SweepConfig
    overrides: Sequence[str]
    plan: SweepPlan
    trials: Sequence[TrialResult]
    price: float | None = None

    @cached_property
    def rows(self) -> list[TrialRow]:
        """Return one row per trial."""
        rows = []
        for number, trial in enumerate(self.trials):
            artifacts = self.plan.artifacts(number)
            objectives = _objectives(trial, artifacts)
            scores = {name: headline_score(artifacts[_EVALUATE + name]) for name in scored_benchmarks(artifacts)}
            stages = self._training_hours(number, artifacts)
            total, shared = sum(hours for hours, _ in stages), sum(hours / users for hours, users in stages)
            rows.append(TrialRow(trial, artifacts, scores, objectives, total, shared))
        return rows

    def _training_hours(self, number: int, artifacts: Mapping[str, Artifact]) -> list[tuple[float, int]]:
        """Return (device-hours, number of trials that use it) of each training stage of a trial.

        Stages that were stopped or failed are included.
        """
        rate = device_hours_per_second(self.plan.variants[number].recipe.resources)
        stages = [stage for stage in self.plan.stages[number] if stage.kind in TRAINING_STAGES]
        seconds = [training_seconds(stage.spec().path, artifacts.get(stage.label)) for stage in stages]
        users = [self._users[stage.spec().fingerprint] for stage in stages]
        return [(rate * stage_seconds, count) for stage_seconds, count in zip(seconds, users, strict=True)]

    @cached_property
    def _users(self) -> dict[str, int]:
        return {stage.fingerprint: stage.users for stage in self.plan.planned_stages}

    @cached_property
    def best_rows(self) -> list[TrialRow]:
        """Return one row per variant: its only trial, or the best trial of its search. Failed variants are omitted."""
        if self.sweep.search is None:
            return [row for row in self.rows if row.trial.outcome == "done"]
        name, direction = next(iter(self.sweep.search.objective.items()))
        sign = 1.0 if direction == "max" else -1.0
        best: dict[tuple[object, ...], TrialRow] = {}
        for row in self.rows:
            key = (*row.levels, row.trial.variant.seed)
            if row.objectives and (key not in best or sign * row.objectives[name] > sign * best[key].objectives[name]):
                best[key] = row
        return list(best.values())

    def headline_metric(self, benchmark: str) -> str:
        """Return the display name of the benchmark's headline metric."""
        row = next(row for row in self.rows if benchmark in row.scores)
        return str(row.artifacts[_EVALUATE + benchmark].metrics["headline"]).replace("_", " ")

    @cached_property
    def benchmarks(self) -> list[str]:
        """Return the benchmarks on which at least one variant was scored."""
        return list(dict.fromkeys(name for row in self.rows for name in row.scores))

    def effects(self, benchmark: str) -> list[Effect]:
        """Return the effect of each level on a benchmark's score, among the best rows."""
        return self._effects[benchmark]

    @cached_property
    def _effects(self) -> dict[str, list[Effect]]:
        """Effects by benchmark, computed once: the Markdown and the HTML report use them several times."""
        axes = {axis: list(levels) for axis, levels in self.sweep.axes.items()}
        return {name: estimate_effects(self._graded_variants(name), axes) for name in self.benchmarks}

    def _graded_variants(self, benchmark: str) -> list[GradedVariant]:
        return [
            GradedVariant(
                row.trial.variant.levels,
                row.trial.variant.seed,
                _per_question_scores(row.artifacts[_EVALUATE + benchmark]),
            )
            for row in self.best_rows
            if benchmark in row.scores
        ]

    def _costs(self, row: TrialRow) -> dict[str, float]:
        """Return the price of a trial's training, by itself and with shared stages split; nothing without a price."""
        if self.price is None:
            return {}
        return {"cost": self.price * row.device_hours, "shared_cost": self.price * row.shared_device_hours}

    @property
    def total_device_hours(self) -> float:
        """Return the device-hours of training that the sweep used."""
        return sum(row.shared_device_hours for row in self.rows)

    @property
    def unshared_device_hours(self) -> float:
        """Return the device-hours of training that the trials would have used without sharing stages."""
        return sum(row.device_hours for row in self.rows)

    @cached_property
    def pareto_rows(self) -> list[TrialRow]:
        """Return the trials of a search that no other trial surpasses in one objective and equals in the others."""
        search = self.sweep.search
        if search is None:
            return []
        rows = [row for row in self.rows if row.objectives.keys() >= search.objective.keys()]
        signs = {name: 1.0 if direction == "max" else -1.0 for name, direction in search.objective.items()}
        values = [tuple(sign * row.objectives[name] for name, sign in signs.items()) for row in rows]
        return [
            row
            for row, value in zip(rows, values, strict=True)
            if not any(other != value and all(a >= b for a, b in zip(other, value, strict=True)) for other in values)
        ]

    def loss_curves(self) -> Iterator[tuple[TrialRow, list[tuple[int, float]]]]:
        """Yield each trial's finetuning curve as (step, mean loss) points, including trials that were stopped."""
        for number, row in enumerate(self.rows):
            stages = [stage for stage in self.plan.stages[number] if stage.kind == "finetune"]
            steps = [step for stage in stages for step in recorded_steps(stage.spec().path)]
            if steps:
                yield row, _downsample(steps)

    def table(self) -> list[dict[str, Any]]:
        """Return the rows of results.csv: one mapping per trial, all with the same keys."""
        records = []
        for row in self.rows:
            variant, model = row.trial.variant, row.artifacts.get("finetune")
            records.append(
                {
                    **variant.levels,
                    **({} if variant.seed is None else {"seed": variant.seed}),
                    **variant.searched,
                    **{name: row.scores.get(name) for name in self.benchmarks},
                    "final_loss": model and model.metrics["final_loss"],
                    "outcome": row.trial.outcome,
                    "failure": row.trial.failure,
                    "device_hours": row.device_hours,
                    "shared_device_hours": row.shared_device_hours,
                    **self._costs(row),
                    "model_path": model and str(model.path),
                }
            )
        return records


def _objectives(trial: TrialResult, artifacts: Mapping[str, Artifact]) -> Mapping[str, float]:
    """Return the objectives of a finished trial; values recorded in its study take precedence over the artifacts'."""
    if trial.outcome != "done":
        return {}
    recorded = trial.record.objectives if trial.record else {}
    return {**(compute_objectives(artifacts) if "finetune" in artifacts else {}), **recorded}


def _per_question_scores(evaluation: Artifact) -> dict[str, float]:
    """Return the scores (0 to 1) of an evaluation by question id."""
    return json.loads((evaluation.path / PER_QUESTION_SCORES).read_bytes())


def _downsample(recorded: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Average consecutive steps into at most _CURVE_POINTS points; steps without a finite loss are skipped."""
    steps = [(step["step"], step["loss"]) for step in recorded if step.get("loss") is not None]
    size = max(1, -(-len(steps) // _CURVE_POINTS))
    windows = [steps[start : start + size] for start in range(0, len(steps), size)]
    return [(window[-1][0] + 1, sum(loss for _, loss in window) / len(window)) for window in windows]
