"""Ray Tune's interface to a sweep: a searcher that suggests the next trial and records how each one ends.

Results and studies are in storage. What the searcher itself knows is which source and which tracked trial belong to
each of Ray Tune's running trials; `save` and `restore` keep that as JSON, and so does the copy that Ray Tune pickles,
which must not contain connections (a database's URL may hold a password). That copy is a record: `restore` gives the
state to a searcher that was built for the same sweep.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ray.tune.search import Searcher

from raylava.errors import UserError, first_line
from raylava.tune.variants import LOST, Variant

TuneResult = Mapping[str, Any]


class TrialSource(Protocol):
    """Supplies the trials of one variant."""

    variant: Variant

    def next_settings(self, trial_id: str, allow_new: bool) -> Mapping[str, Any] | None:
        """Start the next trial under Ray Tune's `trial_id` and return its settings, None when there is none left.

        With `allow_new` False, only trials interrupted with an earlier driver are started.
        """

    def record_loss(self, trial_id: str, rung: int, loss: float) -> None:
        """Record a trial's loss at a rung."""

    def finished_losses(self) -> list[Mapping[int, float]]:
        """Return the losses, by rung, of every trial that has ended, also with earlier drivers."""

    def on_trial_complete(self, trial_id: str, result: TuneResult | None = None, error: bool = False) -> None:
        """Record the outcome of a trial."""

    def state(self) -> dict[str, Any]:
        """Return what the source knows about running trials, as a JSON-serializable value."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same source."""


class Budget(Protocol):
    """The budget of a search, see budget.py."""

    def exhausted(self) -> bool:
        """Return whether no new trial may start."""


class SingleTrial:
    """The source of a variant without a search: exactly one trial, with the variant's recipe."""

    def __init__(self, variant: Variant) -> None:
        self.variant, self._started = variant, False
        self.failure: str | None = "the trial was not started"

    def next_settings(self, trial_id: str, allow_new: bool) -> Mapping[str, Any] | None:
        """See TrialSource."""
        if self._started:
            return None
        self._started, self.failure = True, "the trial did not finish"
        return {}

    def record_loss(self, trial_id: str, rung: int, loss: float) -> None:
        """Do nothing: without a search no trial is stopped early."""

    def finished_losses(self) -> list[Mapping[int, float]]:
        """Return nothing: no other trial is comparable."""
        return []

    def on_trial_complete(self, trial_id: str, result: TuneResult | None = None, error: bool = False) -> None:
        """See TrialSource."""
        report = result or {}
        done = any(name.startswith("objective/") for name in report)
        self.failure = LOST if error else None if done else report.get("failure", "the trial was stopped")

    def state(self) -> dict[str, Any]:
        """See TrialSource."""
        return {"started": self._started, "failure": self.failure}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See TrialSource."""
        self._started, self.failure = state["started"], state["failure"]


class SweepSearcher(Searcher):
    """Suggests trials of the sources in round-robin order until all are exhausted.

    When the search budget is exhausted, only interrupted trials are suggested.
    """

    def __init__(
        self,
        sources: Sequence[TrialSource],
        apply_settings: Callable[[Variant, Mapping[str, Any]], Variant],
        add_trial: Callable[[Variant], int],
        finish_trial: Callable[[int, str], None],
        budget: Budget,
        concurrency_limit: Callable[[], int],
    ) -> None:
        """`add_trial` registers a trial with the tracker and returns its number.

        `finish_trial` receives the outcome, `stopped` or `failed`, of trials that cannot report it themselves.
        """
        super().__init__()
        self._sources, self._apply_settings, self._budget = list(sources), apply_settings, budget
        self._add_trial, self._finish_trial, self._concurrency_limit = add_trial, finish_trial, concurrency_limit
        self._running: dict[str, tuple[TrialSource, int]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """See Searcher. Returns None while as many trials run as may: Ray Tune asks again.

        A trial whose settings form no valid recipe fails at once; the next one is suggested.
        """
        if len(self._running) >= self._concurrency_limit():
            return None
        while (suggestion := self._next_suggestion(trial_id)) is not None:
            source, settings = suggestion
            try:
                variant = self._apply_settings(source.variant, settings) if settings else source.variant
            except UserError as error:
                source.on_trial_complete(trial_id, {"failure": first_line(error)})
                continue
            number = self._add_trial(variant)
            self._running[trial_id] = source, number
            return {"trial": number}
        return str(Searcher.FINISHED)

    def _next_suggestion(self, trial_id: str) -> tuple[TrialSource, Mapping[str, Any]] | None:
        allow_new = not self._budget.exhausted()
        for _ in range(len(self._sources)):
            source = self._sources.pop(0)
            self._sources.append(source)
            settings = source.next_settings(trial_id, allow_new)
            if settings is not None:
                return source, settings
        return None

    def source(self, trial_id: str) -> TrialSource:
        """Return the source of a running trial."""
        return self._running[trial_id][0]

    def record_loss(self, trial_id: str, rung: int, loss: float) -> None:
        """Record a running trial's loss at a rung."""
        self.source(trial_id).record_loss(trial_id, rung, loss)

    def record_stop(self, trial_id: str) -> None:
        """Tell the tracker that a running trial is stopped early."""
        self._finish_trial(self._running[trial_id][1], "stopped")

    def on_trial_result(self, trial_id: str, result: TuneResult) -> None:
        """Do nothing: EarlyStopping records intermediate results before it decides."""

    def on_trial_complete(self, trial_id: str, result: TuneResult | None = None, error: bool = False) -> None:
        """See Searcher."""
        source, number = self._running.pop(trial_id)
        if error:
            self._finish_trial(number, "failed")
        source.on_trial_complete(trial_id, result, error)

    def state(self) -> dict[str, Any]:
        """Return the state of the sources, in the order of their next suggestions, and of the running trials."""
        return {
            "sources": {source.variant.name: source.state() for source in self._sources},
            "running": {
                trial_id: {"variant": source.variant.name, "number": number}
                for trial_id, (source, number) in self._running.items()
            },
        }

    def save(self, checkpoint_path: str) -> None:
        """Write the state as JSON."""
        Path(checkpoint_path).write_text(json.dumps(self.state()))

    def restore(self, checkpoint_path: str) -> None:
        """Continue from a state that a searcher of the same sweep saved."""
        state = json.loads(Path(checkpoint_path).read_text())
        sources = {source.variant.name: source for source in self._sources}
        assert sources.keys() == state["sources"].keys(), "the state is that of another sweep"
        for name, source_state in state["sources"].items():
            sources[name].restore(source_state)
        self._sources = [sources[name] for name in state["sources"]]
        self._running = {
            trial_id: (sources[trial["variant"]], trial["number"]) for trial_id, trial in state["running"].items()
        }

    def __getstate__(self) -> dict[str, Any]:
        return self.state()
