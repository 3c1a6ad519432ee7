"""What a sweep found, read from its artifacts: a row a trial, what levels buy, what it cost. report.py writes it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raylava.artifacts import Artifact
from raylava.cli.tables import benchmarks, headline
from raylava.config.recipe import Resources
from raylava.evaluate.compare import CREDIT
from raylava.train.metrics_logger import recorded_steps, training_seconds
from raylava.tune.effects import Effect, Graded, effects
from raylava.tune.records import TrialResult
from raylava.tune.sweep import Sweep
from raylava.tune.sweep_plan import SweepPlan
from raylava.tune.trial import objectives

_EVALUATE = "evaluate "
_CURVE_POINTS = 60
_TRAINED = ("pretrain", "finetune")


@dataclass(frozen=True)
class Row:
    """One trial: its artifacts by stage label, its scores by benchmark, its objectives by name.

    `cost` is device-hours of training (GPUs, or CPU cores where there are none) of all the stages that it needs,
    `share` its part of them when stages are paid for by all that use them.
    """

    ended: TrialResult
    artifacts: Mapping[str, Artifact]
    scores: Mapping[str, float]
    values: Mapping[str, float]
    cost: float
    share: float

    @property
    def levels(self) -> tuple[str, ...]:
        """One of each axis."""
        return tuple(self.ended.variant.levels.values())


@dataclass(frozen=True)
class SweepResults:
    """A sweep that ran. Rows are in the trials' order."""

    sweep: Sweep
    overrides: Sequence[str]
    plan: SweepPlan
    ended: Sequence[TrialResult]

    @cached_property
    def rows(self) -> list[Row]:
        """A row a trial."""
        found = []
        for number, ended in enumerate(self.ended):
            artifacts = self.plan.artifacts(number)
            values = _values(ended, artifacts)
            names = benchmarks(artifacts)
            scores = {name: headline(artifacts[_EVALUATE + name]) for name in names}
            costs = self._costs(number, artifacts)
            cost, share = sum(cost for cost, _ in costs), sum(cost / users for cost, users in costs)
            found.append(Row(ended, artifacts, scores, values, cost, share))
        return found

    def _costs(self, number: int, artifacts: Mapping[str, Artifact]) -> list[tuple[float, int]]:
        """Device-hours of each of a trial's trainings, and how many trials use it; those that were stopped or failed on
        the way are among them.
        """
        hours = device_hours(self.plan.variants[number].recipe.resources)
        trained = [stage for stage in self.plan.stages[number] if stage.spec.stage in _TRAINED]
        seconds = [training_seconds(stage.spec.path, artifacts.get(stage.label)) for stage in trained]
        users = [self._users[stage.spec.fingerprint] for stage in trained]
        return [(hours * own, used) for own, used in zip(seconds, users, strict=True)]

    @cached_property
    def _users(self) -> dict[str, int]:
        return {work.fingerprint: work.users for work in self.plan.works}

    @cached_property
    def chosen(self) -> list[Row]:
        """One row a variant: its only trial, or the best that its search found. Variants without one are left out."""
        if self.sweep.search is None:
            return [row for row in self.rows if row.ended.how == "done"]
        name, direction = next(iter(self.sweep.search.objective.items()))
        sign = 1.0 if direction == "max" else -1.0
        best: dict[tuple[object, ...], Row] = {}
        for row in self.rows:
            key = (*row.levels, row.ended.variant.seed)
            if row.values and (key not in best or sign * row.values[name] > sign * best[key].values[name]):
                best[key] = row
        return list(best.values())

    def headline(self, benchmark: str) -> str:
        """The name of the figure that a benchmark is known by."""
        row = next(row for row in self.rows if benchmark in row.scores)
        return str(row.artifacts[_EVALUATE + benchmark].metrics["headline"]).replace("_", " ")

    @cached_property
    def benchmarks(self) -> list[str]:
        """All that a variant was scored on."""
        return list(dict.fromkeys(name for row in self.rows for name in row.scores))

    def effects(self, benchmark: str) -> list[Effect]:
        """What each level buys, among the chosen rows."""
        return self._effects[benchmark]

    @cached_property
    def _effects(self) -> dict[str, list[Effect]]:
        """By benchmark: report and page tell them more than once."""
        axes = {axis: list(levels) for axis, levels in self.sweep.axes.items()}
        return {name: effects(self._graded(name), axes) for name in self.benchmarks}

    def _graded(self, benchmark: str) -> list[Graded]:
        return [
            Graded(row.ended.variant.levels, row.ended.variant.seed, _credit(row.artifacts[_EVALUATE + benchmark]))
            for row in self.chosen
            if benchmark in row.scores
        ]

    @property
    def paid(self) -> float:
        """Device-hours of training that were spent."""
        return sum(row.share for row in self.rows)

    @property
    def unshared(self) -> float:
        """Device-hours that the same trials would have taken one by one."""
        return sum(row.cost for row in self.rows)

    def curves(self) -> Iterator[tuple[Row, list[tuple[int, float]]]]:
        """(step, loss) of each trial's finetuning, thinned to the means of so many stretches; of stopped ones too."""
        for number, row in enumerate(self.rows):
            for stage in self.plan.stages[number]:
                steps = recorded_steps(stage.spec.path) if stage.label == "finetune" else []
                if steps:
                    yield row, _thinned(steps)

    def table(self) -> list[dict[str, Any]]:
        """results.csv: a mapping a trial, all with the same keys."""
        found = []
        for row in self.rows:
            variant, model = row.ended.variant, row.artifacts.get("finetune")
            found.append(
                {
                    **variant.levels,
                    **({} if variant.seed is None else {"seed": variant.seed}),
                    **variant.searched,
                    **{name: row.scores.get(name) for name in self.benchmarks},
                    "final_loss": model and model.metrics["final_loss"],
                    "ended": row.ended.how,
                    "failure": row.ended.failure,
                    "cost_hours": row.cost,
                    "share_hours": row.share,
                    "model_path": model and str(model.path),
                }
            )
        return found


def device_hours(resources: Resources) -> float:
    """Device-hours of one second of training."""
    return resources.workers * (resources.gpus_per_worker or resources.cpus_per_worker) / 3600


def _values(ended: TrialResult, artifacts: Mapping[str, Artifact]) -> Mapping[str, float]:
    """What a trial reached: as its study knows it, else as its artifacts say."""
    if ended.how != "done":
        return {}
    known = ended.tried.values if ended.tried else {}
    return {**(objectives(artifacts) if "finetune" in artifacts else {}), **known}


def _credit(evaluation: Artifact) -> dict[str, float]:
    """By question id."""
    return json.loads((evaluation.path / CREDIT).read_bytes())


def _thinned(recorded: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Steps whose loss is missing (not finite) are left out."""
    steps = [(step["step"], step["loss"]) for step in recorded if step.get("loss") is not None]
    size = max(1, -(-len(steps) // _CURVE_POINTS))
    parts = [steps[at : at + size] for at in range(0, len(steps), size)]
    return [(part[-1][0] + 1, sum(loss for _, loss in part) / len(part)) for part in parts]
