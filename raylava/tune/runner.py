"""Driver of a sweep: runs the trials of its variants under Ray Tune and displays their progress.

The artifacts and studies hold the whole state of a sweep. When it is run again, finished stages are reused, interrupted
ones resume from their checkpoints, and Ray Tune's own state is not needed.
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import ray
from ray import tune
from rich.table import Table

from raylava.artifacts import lock
from raylava.cluster.roles import TRAIN, node_labels_for
from raylava.cluster.session import joins_running_cluster, on_driver_node, ray_session
from raylava.console import Console
from raylava.errors import UserError, first_line
from raylava.pipeline.graph import InputCache, build_stages, make_absolute, pin_commits
from raylava.pipeline.runner import check_capacity
from raylava.pipeline.stage import Stage
from raylava.pipeline.stages import TrainStage
from raylava.progress import poll_in_background
from raylava.storage import StoragePath
from raylava.tune.budget import SearchBudget, TrainingHours
from raylava.tune.concurrency import ConcurrencyLimit
from raylava.tune.early_stopping import EarlyStopping
from raylava.tune.prefixes import PrefixPlan, plan_prefixes, unneeded_states
from raylava.tune.searcher import SingleTrial, SweepSearcher
from raylava.tune.study import StudyRegistry, VariantStudy, sample_settings
from raylava.tune.sweep import SearchConfig, SweepConfig
from raylava.tune.tables import progress_table, trial_states
from raylava.tune.tracker import TrialStatus, TrialTracker
from raylava.tune.trial import run_trial
from raylava.tune.variants import TrialRecord, TrialResult, Variant, variants, with_settings

_MAX_WORKER_FAILURES = 8  # restarts of a trial whose process died before the trial fails

Sources = Sequence[SingleTrial] | Sequence[VariantStudy]
Trainable = Callable[[dict[str, Any]], None]


class SweepRun:
    """One sweep in one storage location."""

    def __init__(self, sweep: SweepConfig, overrides: list[str], storage: StoragePath) -> None:
        """Expand the sweep into variants. Raises UserError for a sweep whose variants are not valid recipes."""
        self.sweep, self._overrides, self._storage = sweep, overrides, storage
        self.folder = storage / "sweeps" / sweep.name
        self.inputs = InputCache()  # shared by all variants, plan and report; trials get what it has resolved
        self._variants = variants(sweep, overrides)
        self.trial_statuses: list[TrialStatus] = []  # final status of the trials of the last `run`, in starting order

    def planned_variants(self) -> list[Variant]:
        """Return the variants of all trials.

        For a search these are the trials of its studies and, for the trials still to come, random points of its space:
        their settings are not known yet, but the stages that they share are.
        """
        search = self.sweep.search
        if search is None:
            return self._variants
        planned, studies = [], self._studies(search)
        for variant in self._variants:
            recorded = [trial.settings for trial in studies.load_trials(variant)]
            missing = max(0, (search.trials or 1) - len(recorded))
            for settings in (*recorded, *sample_settings(search, missing)):
                with suppress(UserError):  # settings that form no valid recipe build nothing
                    planned.append(self._apply_settings(variant, settings))
        return planned

    def run(self, console: Console, price: float | None = None, trainable: Trainable = run_trial) -> list[TrialResult]:
        """Run the missing trials and return the results of all trials, including those of earlier runs of the sweep.

        `price` is that of a device-hour. `trainable` is what Ray Tune runs; jobs/bench/sweep.py replaces it. Raises
        UserError if the search has a budget in money and there is no price.
        """
        if price is None and self.sweep.search and self.sweep.search.max_cost:
            raise UserError(f"search.max_cost={self.sweep.search.max_cost:g} needs prices; give --prices FILE")
        resources = [variant.recipe.resources for variant in self._variants]
        largest = max(resources, key=lambda request: request.workers * request.cpus_per_worker)
        with lock(self.folder, f"sweep {self.sweep.name}"), ray_session(largest):
            self._check_capacity(console)
            sources = self._sources()
            budget = self._search_budget(sources, price)
            labels = node_labels_for(TRAIN, largest)
            limit = ConcurrencyLimit(resources, labels, self.sweep.max_concurrent_trials, joins_running_cluster())
            self._run_trials(sources, budget, limit, console, trainable)
            for stage in unneeded_states(self._stages):
                stage.delete_final_state()
            return [result for source in sources for result in self._trial_results(source)]

    def _check_capacity(self, console: Console) -> None:
        """Check that the cluster can run the missing stages of each variant (see pipeline.runner.check_capacity)."""
        for variant, stages in zip(self._variants, self._stages, strict=True):
            missing = {stage.kind for stage in stages if stage.spec().find() is None}
            check_capacity(variant.recipe, missing, console)

    @cached_property
    def _stages(self) -> list[list[Stage]]:
        """The stages of each variant; of a search those of its base recipe."""
        return [build_stages(variant.recipe, self._storage, self.inputs) for variant in self._variants]

    @cached_property
    def _prefixes(self) -> PrefixPlan:
        """Which variants continue from others; the settings that a search will suggest are not known."""
        if self.sweep.search is not None:
            return PrefixPlan(frozenset(), ((),) * len(self._variants))
        return plan_prefixes(self._stages)

    def _trial_recipes(self, variant: Variant) -> list[str]:
        """Return, as JSON, the variant's recipe and those of the variants that it continues from."""
        numbers = self._prefixes.providers[self._variants.index(variant)] if self.sweep.search is None else ()
        recipes = [variant.recipe, *(self._variants[number].recipe for number in numbers)]
        return [pin_commits(make_absolute(recipe)).model_dump_json() for recipe in recipes]

    def _search_budget(self, sources: "Sources", price: float | None) -> SearchBudget:
        search = self.sweep.search
        if search is None:
            return SearchBudget(self.folder / "spent.json", None)
        file = self.folder / f"spent-{self._study_name(search)}.json"
        if search.max_cost is None:
            return SearchBudget(file, search.hours)
        assert price is not None, "run() refuses max_cost without prices"
        studies = [source for source in sources if isinstance(source, VariantStudy)]
        device_hours = TrainingHours(studies, self._trial_stages)
        return SearchBudget(file, search.hours, search.max_cost, lambda: price * device_hours())

    def _trial_stages(self, variant: Variant, record: TrialRecord) -> list[TrainStage]:
        """Return the training stages of a trial; none if its settings form no valid recipe."""
        try:
            recipe = self._apply_settings(variant, record.settings).recipe
        except UserError:
            return []
        stages = build_stages(recipe, self._storage, self.inputs)
        return [stage for stage in stages if isinstance(stage, TrainStage)]

    def _planned_trials(self, sources: "Sources") -> int | None:
        """Return the number of trials that this run will start, None for a search without a number of trials."""
        per_variant = self.sweep.search.trials if self.sweep.search else 1
        studies = [source for source in sources if isinstance(source, VariantStudy)]
        finished = [trial for study in studies for trial in study.trials if trial.outcome]
        return per_variant and per_variant * len(sources) - len(finished)

    def _studies(self, search: SearchConfig) -> StudyRegistry:
        def stage_fingerprints(variant: Variant) -> list[str]:
            stages = build_stages(variant.recipe, self._storage, self.inputs)
            return [stage.spec().fingerprint for stage in stages]

        return StudyRegistry(search, self._study_name(search), self.folder, stage_fingerprints)

    def _study_name(self, search: SearchConfig) -> str:
        return search.study or self.sweep.name

    def _apply_settings(self, variant: Variant, settings: Mapping[str, Any]) -> Variant:
        return with_settings(self.sweep, variant, settings, self._overrides)

    def _sources(self) -> list[SingleTrial] | list[VariantStudy]:
        search = self.sweep.search
        if search is None:
            return [SingleTrial(variant) for variant in self._variants]
        return self._studies(search).resume_studies(self._variants)

    def _run_trials(
        self,
        sources: "Sources",
        budget: SearchBudget,
        limit: ConcurrencyLimit,
        console: Console,
        trainable: Trainable,
    ) -> None:
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        # Otherwise Ray Tune would return normally on Ctrl-C, and interrupted trials would count as results.
        os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
        tracker = TrialTracker.options(scheduling_strategy=on_driver_node()).remote()  # type: ignore[attr-defined]
        searcher = SweepSearcher(
            sources,
            self._apply_settings,
            lambda variant: ray.get(tracker.add_trial.remote(variant.name, self._trial_recipes(variant))),
            lambda number, outcome: tracker.finish.remote(number, outcome),
            budget,
            limit,
        )
        config = {
            "storage": self._storage.uri,
            "tracker": tracker,
            "search": self.sweep.search is not None,
            "joined": joins_running_cluster(),
            "sources": self.inputs.resolved_sources,
            "extended": sorted(self._prefixes.extended),
        }
        live_table = _live_progress_table(tracker, self._planned_trials(sources), budget, console)
        with tempfile.TemporaryDirectory(prefix="raylava-tune-") as folder, live_table:
            tune.Tuner(
                tune.with_resources(trainable, _trial_bundles()),
                param_space=config,
                tune_config=tune.TuneConfig(
                    search_alg=searcher,
                    scheduler=EarlyStopping(searcher, self.sweep.search.early_stopping if self.sweep.search else None),
                    num_samples=-1,
                    # A process whose trial was stopped early is still training, and cannot be reused.
                    reuse_actors=not (self.sweep.search and self.sweep.search.early_stopping),
                ),
                run_config=tune.RunConfig(
                    storage_path=folder,
                    name="sweep",
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=_MAX_WORKER_FAILURES),
                ),
            ).fit()
            self.trial_statuses = ray.get(tracker.statuses.remote())

    def recorded_results(self) -> list[TrialResult]:
        """Return the results of all trials that storage records, without running any; none if nothing is recorded.

        A trial that is not finished counts as failed.
        """
        search = self.sweep.search
        if search is not None:
            studies = self._studies(search)
            return [
                self._trial_result(variant, record)
                for variant in self._variants
                for record in studies.load_trials(variant)
            ]
        if not any(stage.spec().find() for stages in self._stages for stage in stages):
            return []
        return [
            self._recorded_result(variant, stages) for variant, stages in zip(self._variants, self._stages, strict=True)
        ]

    def _recorded_result(self, variant: Variant, stages: Sequence[Stage]) -> TrialResult:
        missing = [stage.label for stage in stages if stage.spec().find() is None]
        if missing:
            return TrialResult(variant, "failed", f"not built: {', '.join(missing)}")
        return TrialResult(variant, "done")

    def _trial_results(self, source: SingleTrial | VariantStudy) -> list[TrialResult]:
        if isinstance(source, SingleTrial):
            return [TrialResult(source.variant, "failed" if source.failure else "done", source.failure)]
        return [self._trial_result(source.variant, record) for record in source.trials]

    def _trial_result(self, variant: Variant, record: TrialRecord) -> TrialResult:
        outcome = record.outcome or "failed"
        try:
            return TrialResult(self._apply_settings(variant, record.settings), outcome, record.failure, record)
        except UserError as error:
            settings = variant.settings | dict(record.settings)
            invalid = dataclasses.replace(variant, settings=settings, searched=record.settings)
            failure = record.failure or first_line(error)
            return TrialResult(invalid, "failed", failure, record, is_valid_recipe=False)


def _trial_bundles() -> tune.PlacementGroupFactory:
    """Return the placement group of a trial: 1 byte (Ray Tune requires a resource), pinned to the driver's node.

    The loss of a worker node then never takes the trials down that supervise its workers.
    """
    node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return tune.PlacementGroupFactory([{"memory": 1}], bundle_label_selector=[node])


@contextmanager
def _live_progress_table(
    tracker: Any, planned_trials: int | None, budget: SearchBudget, console: Console
) -> Iterator[None]:
    """Display the progress of the trials, and save the budget, while Ray Tune blocks the main thread."""

    def statuses() -> list[TrialStatus]:
        return ray.get(tracker.statuses.remote())

    def render() -> Table:
        return progress_table(statuses(), time.time(), planned_trials)

    with console.live(render, lambda: trial_states(statuses())) as refresh:

        def poll() -> None:
            budget.save()
            refresh()

        with poll_in_background(poll):
            yield
