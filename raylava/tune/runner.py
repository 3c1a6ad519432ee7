"""The driver's side of a sweep: Ray Tune over its variants, a table that lives, and who failed why.

The artifacts and studies are the sweep's memory: run again, what is finished is found, what was under way goes on from
its checkpoints, and Tune's own state is not needed.
"""

import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import tune
from rich.table import Table

from raylava.artifacts import lock
from raylava.cluster.nodes import eventual_resources
from raylava.cluster.roles import TRAIN, labels_for
from raylava.cluster.session import here, ray_session
from raylava.config.recipe import Resources
from raylava.console import Console, poll_in_background
from raylava.errors import UserError, first_line
from raylava.evaluate.benchmarks import BenchmarkCache
from raylava.pipeline.stages import absolute, check_capacity, stages_of
from raylava.storage import StoragePath, retry
from raylava.tune.records import TrialRecord, TrialResult
from raylava.tune.searcher import EarlyStop, SingleTrial, SweepSearcher
from raylava.tune.study import Studies, VariantSearch, drawn
from raylava.tune.sweep import Search, Sweep
from raylava.tune.tables import progress_table
from raylava.tune.tracker import TrialStatus, TrialTracker
from raylava.tune.trial import run_trial
from raylava.tune.variants import Variant, variants, with_settings

_KEEP_EVERY_SECONDS = 60.0
_MAX_LOSSES = 8  # processes that a trial may lose before it is given up

Sources = Sequence[SingleTrial] | Sequence[VariantSearch]


class SweepRun:
    """One sweep in one storage."""

    def __init__(self, sweep: Sweep, overrides: list[str], storage: StoragePath) -> None:
        """Raises UserError for what is no sweep of valid recipes."""
        self.sweep, self._overrides, self._storage = sweep, overrides, storage
        self.folder = storage / "sweeps" / sweep.name
        self._variants = variants(sweep, overrides)
        self.begun: list[TrialStatus] = []  # where the trials of the last `run` ended, in the order they began

    def expected(self) -> list[Variant]:
        """The variants of all trials. Of a search, those tried before and, for those to come, points drawn from its
        space: which they will be is not known yet, what stages they share is.
        """
        search = self.sweep.search
        if search is None:
            return self._variants
        found, studies = [], self._studies(search)
        for variant in self._variants:
            known = [one.settings for one in studies.look(variant)]
            missing = max(0, (search.trials or 1) - len(known))
            for settings in (*known, *drawn(search, missing)):
                with suppress(UserError):  # settings that are no recipe make nothing
                    found.append(self._with(variant, settings))
        return found

    def run(self, console: Console) -> list[TrialResult]:
        """Make what is missing. Returns how every trial ended, those of earlier runs of this sweep included."""
        resources = [variant.recipe.resources for variant in self._variants]
        largest = max(resources, key=lambda one: one.workers * one.cpus_per_worker)
        with lock(self.folder, f"sweep {self.sweep.name}"), ray_session(largest):
            self._check_room(console)
            sources = self._sources()
            clock = self._clock()
            at_once = concurrent_trials(resources, eventual_resources(labels_for(TRAIN, largest)))
            self._tune(sources, clock, min(at_once, self.sweep.max_concurrent_trials or at_once), console)
            return [one for source in sources for one in self._ended(source)]

    def _check_room(self, console: Console) -> None:
        """For what is missing of each variant; see stages.check_capacity."""
        exams = BenchmarkCache()
        for variant in self._variants:
            missing = [one for one in stages_of(variant.recipe, self._storage, exams) if one.spec.find() is None]
            check_capacity(variant.recipe, {one.spec.stage for one in missing}, console)

    def _clock(self) -> "SearchBudget":
        search = self.sweep.search
        if search is None:
            return SearchBudget(self.folder / "spent.json", None)
        return SearchBudget(self.folder / f"spent-{self._study_name(search)}.json", search.hours)

    def _expected(self, sources: "Sources") -> int | None:
        """SweepSearcher that this run will begin, where somebody knows."""
        each = self.sweep.search.trials if self.sweep.search else 1
        ended = [one for source in sources if isinstance(source, VariantSearch) for one in source.tried if one.ended]
        return each and each * len(sources) - len(ended)

    def _studies(self, search: Search) -> Studies:
        def about(variant: Variant) -> list[str]:
            return [stage.spec.fingerprint for stage in stages_of(variant.recipe, self._storage)]

        return Studies(search, self._study_name(search), self.folder, about)

    def _study_name(self, search: Search) -> str:
        return search.study or self.sweep.name

    def _with(self, variant: Variant, settings: Mapping[str, Any]) -> Variant:
        return with_settings(self.sweep, variant, settings, self._overrides)

    def _sources(self) -> list[SingleTrial] | list[VariantSearch]:
        search = self.sweep.search
        if search is None:
            return [SingleTrial(variant) for variant in self._variants]
        return self._studies(search).take(self._variants)

    def _tune(self, sources: "Sources", clock: "SearchBudget", at_once: int, console: Console) -> None:
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # else it would make a result of what Ctrl-C cut off
        board = TrialTracker.options(scheduling_strategy=here()).remote()  # type: ignore[attr-defined]
        trials = SweepSearcher(
            sources,
            self._with,
            lambda variant: ray.get(board.join.remote(variant.name, absolute(variant.recipe).model_dump_json())),
            lambda number, how: board.end.remote(number, how),
            clock.is_over,
        )
        settings = {"storage": self._storage.uri, "board": board, "search": self.sweep.search is not None}
        shown = _shown(board, self._expected(sources), clock, console)
        with tempfile.TemporaryDirectory(prefix="raylava-tune-") as folder, shown:
            tune.Tuner(
                tune.with_resources(run_trial, _trial_bundles()),
                param_space=settings,
                tune_config=tune.TuneConfig(
                    search_alg=trials, scheduler=EarlyStop(trials), num_samples=-1, max_concurrent_trials=at_once
                ),
                run_config=tune.RunConfig(
                    storage_path=folder,
                    name="sweep",
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=_MAX_LOSSES),
                ),
            ).fit()
            self.begun = ray.get(board.look.remote())

    def _ended(self, source: SingleTrial | VariantSearch) -> list[TrialResult]:
        if isinstance(source, SingleTrial):
            return [TrialResult(source.variant, "failed" if source.failure else "done", source.failure)]
        return [self._ended_trial(source.variant, one) for one in source.tried]

    def _ended_trial(self, variant: Variant, one: TrialRecord) -> TrialResult:
        how = one.ended or "failed"
        try:
            return TrialResult(self._with(variant, one.settings), how, one.failure, one)
        except UserError as error:
            settings = variant.settings | dict(one.settings)
            unmade = dataclasses.replace(variant, settings=settings, searched=one.settings)
            return TrialResult(unmade, "failed", one.failure or first_line(error), one, is_recipe=False)


def concurrent_trials(wanted: list[Resources], cluster: dict[str, float]) -> int:
    """How many trials the cluster can train at once, when each takes what the hungriest does; at least one."""
    cpus = max(one.workers * one.cpus_per_worker for one in wanted)
    gpus = max(one.workers * one.gpus_per_worker for one in wanted)
    fits = int(cluster.get("CPU", 0) // cpus)
    if gpus:
        fits = min(fits, int(cluster.get("GPU", 0) // gpus))
    return max(1, fits)


def _trial_bundles() -> tune.PlacementGroupFactory:
    """What Tune reserves for a trial, which trains nothing itself: a byte, for it will have something, on the driver's
    node: trials watch over workers that come and go, and must not go with them.
    """
    node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return tune.PlacementGroupFactory([{"memory": 1}], bundle_label_selector=[node])


class SearchBudget:
    """Counts the hours that a search has had, over all its runs, in a file of the sweep's folder."""

    def __init__(self, file: StoragePath, hours: float | None) -> None:
        self._file, self._seconds = file, None if hours is None else 3600 * hours
        self._before = json.loads(file.read_bytes())["seconds"] if file.exists() else 0.0
        self._started = time.monotonic()
        self._kept = -math.inf

    @property
    def spent(self) -> float:
        """Seconds."""
        return float(self._before) + time.monotonic() - self._started

    def is_over(self) -> bool:
        """Whether no new trial should begin."""
        self.keep()
        return self._seconds is not None and self.spent >= self._seconds

    def keep(self) -> None:
        """Bring the file up to date; to be called now and then."""
        if self._seconds is not None and time.monotonic() - self._kept > _KEEP_EVERY_SECONDS:
            self._kept = time.monotonic()
            spent = json.dumps({"seconds": self.spent}).encode()
            retry(lambda: self._file.write_bytes(spent), _KEEP_EVERY_SECONDS, f"writing {self._file}")


@contextmanager
def _shown(board: Any, expected: int | None, clock: "SearchBudget", console: Console) -> Iterator[None]:
    """Keep the table in front of the person while Tune blocks."""

    def render() -> Table:
        clock.keep()
        return progress_table(ray.get(board.look.remote()), time.time(), expected)

    with console.live_nodes(render) as refresh, poll_in_background(refresh):
        yield
