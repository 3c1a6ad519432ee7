"""What a sweep comes to before anything runs: its variants' stages, those they share, those that are there already."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from raylava.artifacts import Artifact
from raylava.errors import UserError
from raylava.evaluate.benchmarks import BenchmarkCache
from raylava.pipeline.stage import Stage
from raylava.pipeline.stages import stages_of
from raylava.storage import StoragePath
from raylava.tune.records import TrialResult
from raylava.tune.variants import Variant


@dataclass(frozen=True)
class JobSpec:
    """A distinct stage of a sweep: variants that need it share one artifact."""

    stage: str
    label: str
    fingerprint: str
    users: int
    found: bool


@dataclass(frozen=True)
class SweepPlan:
    """A sweep's variants, each with its stages, in the same order. What is found is looked up once."""

    variants: tuple[Variant, ...]
    stages: tuple[tuple[Stage, ...], ...]

    @cached_property
    def _found(self) -> dict[str, Artifact | None]:
        """By place."""
        specs = {str(stage.spec.path): stage.spec for stages in self.stages for stage in stages}
        return {key: spec.find() for key, spec in specs.items()}

    @cached_property
    def works(self) -> list[JobSpec]:
        """The distinct stages, in the order in which variants first need them."""
        first: dict[str, Stage] = {}
        users: dict[str, int] = {}
        for stage in (one for stages in self.stages for one in stages):
            key = str(stage.spec.path)
            first.setdefault(key, stage)
            users[key] = users.get(key, 0) + 1
        return [
            JobSpec(one.spec.stage, one.label, one.spec.fingerprint, users[key], self._found[key] is not None)
            for key, one in first.items()
        ]

    def artifacts(self, variant: int) -> dict[str, Artifact]:
        """What is there of one variant, by stage label."""
        found = {stage.label: self._found[str(stage.spec.path)] for stage in self.stages[variant]}
        return {label: artifact for label, artifact in found.items() if artifact is not None}


def plan_of(ended: Sequence[TrialResult], storage: StoragePath) -> SweepPlan:
    """The plan of trials that ended; one that failed before it was a recipe, or could be resolved, has no stages."""
    exams, stages = BenchmarkCache(), list[tuple[Stage, ...]]()
    for one in ended:
        try:
            stages.append(tuple(stages_of(one.variant.recipe, storage, exams)) if one.is_recipe else ())
        except UserError:
            if one.how != "failed":
                raise
            stages.append(())
    return SweepPlan(tuple(one.variant for one in ended), tuple(stages))


def plan(variants: Sequence[Variant], storage: StoragePath) -> SweepPlan:
    """Resolve every variant. Raises UserError for input that cannot work, before any worker starts."""
    exams = BenchmarkCache()
    return SweepPlan(tuple(variants), tuple(tuple(stages_of(one.recipe, storage, exams)) for one in variants))
