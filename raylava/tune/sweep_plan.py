"""The stages of a sweep before anything runs: which ones variants share and which artifacts already exist."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from raylava.artifacts import Artifact
from raylava.errors import UserError
from raylava.pipeline.graph import InputCache, build_stages
from raylava.pipeline.stage import Stage
from raylava.storage import StoragePath
from raylava.tune.prefixes import linked_stages, plan_prefixes, with_recorded_prefixes
from raylava.tune.variants import TrialResult, Variant


@dataclass(frozen=True)
class PlannedStage:
    """A distinct stage of a sweep. All its `users` (a number of variants) share one artifact."""

    stage: str
    label: str
    fingerprint: str
    users: int
    is_cached: bool


@dataclass(frozen=True)
class SweepPlan:
    """The variants of a sweep and, in the same order, the stages of each. Artifacts are looked up once."""

    variants: tuple[Variant, ...]
    stages: tuple[tuple[Stage, ...], ...]

    @cached_property
    def _artifacts(self) -> dict[str, Artifact | None]:
        """All artifacts by storage path, None for those that do not exist yet."""
        specs = {str(stage.spec().path): stage.spec() for stages in self.stages for stage in stages}
        return {path: spec.find() for path, spec in specs.items()}

    @cached_property
    def planned_stages(self) -> list[PlannedStage]:
        """Return the distinct stages, in the order in which variants first need them."""
        distinct: dict[str, Stage] = {}
        users: dict[str, int] = {}
        for stage in (stage for stages in self.stages for stage in stages):
            path = str(stage.spec().path)
            distinct.setdefault(path, stage)
            users[path] = users.get(path, 0) + 1
        return [
            PlannedStage(
                stage.kind,
                stage.label,
                stage.spec().fingerprint,
                users[path],
                is_cached=self._artifacts[path] is not None,
            )
            for path, stage in distinct.items()
        ]

    def artifacts(self, variant: int) -> dict[str, Artifact]:
        """Return the existing artifacts of the variant at an index, by stage label."""
        artifacts = {stage.label: self._artifacts[str(stage.spec().path)] for stage in self.stages[variant]}
        return {label: artifact for label, artifact in artifacts.items() if artifact is not None}


def plan_of_results(
    trial_results: Sequence[TrialResult], storage: StoragePath, inputs: InputCache | None = None
) -> SweepPlan:
    """Return the plan of finished trials. `inputs` are those that the sweep has resolved.

    A trial that failed because its settings are no valid recipe, or its inputs cannot be resolved, has no stages.
    """
    inputs, stages = inputs or InputCache(), list[list[Stage]]()
    for result in trial_results:
        try:
            recipe = result.variant.recipe
            stages.append(build_stages(recipe, storage, inputs) if result.is_valid_recipe else [])
        except UserError:
            if result.outcome != "failed":
                raise
            stages.append([])
    variants = tuple(result.variant for result in trial_results)
    return SweepPlan(variants, tuple(map(tuple, with_recorded_prefixes(stages))))


def plan_sweep(variants: Sequence[Variant], storage: StoragePath, inputs: InputCache | None = None) -> SweepPlan:
    """Resolve the stages of every variant. Raises UserError for invalid input, before any worker starts."""
    inputs = inputs or InputCache()
    stages = [build_stages(variant.recipe, storage, inputs) for variant in variants]
    if not any(variant.searched for variant in variants):
        stages = linked_stages(stages, plan_prefixes(stages))
    return SweepPlan(tuple(variants), tuple(map(tuple, stages)))
