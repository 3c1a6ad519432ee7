"""What Ray Tune asks during a sweep: which trial is next, and whether one should stop early.

Tune's own copy of this state (it pickles searchers to be restored) is left empty: what a sweep remembers is in its
artifacts and studies, which also know of trials of earlier drivers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raylava.errors import UserError, first_line
from raylava.tune.records import LOST
from raylava.tune.variants import Variant

Result = Mapping[str, Any]


class Source(Protocol):
    """The trials of one variant."""

    variant: Variant

    def next(self, trial_id: str, fresh: bool) -> Mapping[str, Any] | None:
        """The settings of the next trial, Ray's `trial_id` from now on; None when there is none to hand out, or none
        that an earlier driver left when it may not be a `fresh` one.
        """

    def should_stop(self, trial_id: str, mark: int, loss: float) -> bool:
        """Hear how far a trial is; whether it should stop there."""

    def on_trial_complete(self, trial_id: str, result: Result | None = None, error: bool = False) -> None:
        """Hear how a trial ended."""


class SingleTrial:
    """A variant that is not searched: one trial, as it is."""

    def __init__(self, variant: Variant) -> None:
        self.variant, self._given = variant, False
        self.failure: str | None = "it was not begun"

    def next(self, trial_id: str, fresh: bool) -> Mapping[str, Any] | None:
        """See Source."""
        if self._given:
            return None
        self._given, self.failure = True, "it did not end"
        return {}

    def should_stop(self, trial_id: str, mark: int, loss: float) -> bool:
        """Never."""
        return False

    def on_trial_complete(self, trial_id: str, result: Result | None = None, error: bool = False) -> None:
        """See Source."""
        told = result or {}
        done = any(name.startswith("objective/") for name in told)
        self.failure = LOST if error else None if done else told.get("failure", "it was stopped")


class SweepSearcher(Searcher):
    """Hands trials of the sources to Tune, in turns, until none has more; once the time is over, no fresh ones."""

    def __init__(
        self,
        sources: Sequence[Source],
        made: Callable[[Variant, Mapping[str, Any]], Variant],
        begin: Callable[[Variant], int],
        ended: Callable[[int, str], None],
        time_is_over: Callable[[], bool],
    ) -> None:
        """`made` gives a variant its settings; `begin` enters a trial in the board and returns its number there;
        `ended` is told of those that cannot say themselves that they are `stopped` early or `failed`.
        """
        super().__init__()
        self._sources, self._made, self._time_is_over = list(sources), made, time_is_over
        self._begin, self._ended = begin, ended
        self._of: dict[str, tuple[Source, int]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """See Searcher. A search that gives what is no recipe is told so, and asked again."""
        while (found := self._next(trial_id)) is not None:
            source, settings = found
            try:
                variant = self._made(source.variant, settings) if settings else source.variant
            except UserError as error:
                source.on_trial_complete(trial_id, {"failure": first_line(error)})
                continue
            number = self._begin(variant)
            self._of[trial_id] = source, number
            return {"trial": number}
        return str(Searcher.FINISHED)

    def _next(self, trial_id: str) -> tuple[Source, Mapping[str, Any]] | None:
        fresh = not self._time_is_over()
        for _ in range(len(self._sources)):
            source = self._sources.pop(0)
            self._sources.append(source)
            settings = source.next(trial_id, fresh)
            if settings is not None:
                return source, settings
        return None

    def should_stop(self, trial_id: str, result: Result) -> bool:
        """Whether a trial that told a mark should stop there."""
        if "mark" not in result:
            return False
        source, number = self._of[trial_id]
        stop = source.should_stop(trial_id, result["mark"], result["loss"])
        if stop:
            self._ended(number, "stopped")
        return stop

    def on_trial_result(self, trial_id: str, result: Result) -> None:
        """Heard in should_stop already."""

    def on_trial_complete(self, trial_id: str, result: Result | None = None, error: bool = False) -> None:
        """See Searcher."""
        source, number = self._of.pop(trial_id)
        if error:
            self._ended(number, "failed")
        source.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Tune wants a file there."""
        with open(checkpoint_path, "wb"):
            pass

    def restore(self, checkpoint_path: str) -> None:
        """A sweep is run again, not restored."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {}


class EarlyStop(FIFOScheduler):
    """Trials in the order they come; those stop early of which their study says so."""

    def __init__(self, trials: SweepSearcher) -> None:
        super().__init__()
        self._trials = trials

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Result) -> str:
        """See TrialScheduler."""
        stop = self._trials.should_stop(trial.trial_id, result)
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)

    def __getstate__(self) -> dict[str, Any]:
        return {}
