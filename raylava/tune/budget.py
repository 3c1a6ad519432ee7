"""The budget of a search in hours and in money, over all its runs."""

import json
import math
import time
from collections.abc import Callable, Sequence

from raylava.pipeline.results import device_hours_per_second
from raylava.pipeline.stages import TrainStage
from raylava.storage import StoragePath, retry
from raylava.train.step_log import training_seconds
from raylava.tune.study import VariantStudy
from raylava.tune.variants import TrialRecord, Variant

_SAVE_INTERVAL_SECONDS = 60.0


class TrainingHours:
    """Computes the device-hours of training of all trials of studies from the step logs in storage.

    Stages that trials share count once. Trials of earlier drivers, and those that failed or are running, count, too.
    """

    def __init__(
        self, studies: Sequence[VariantStudy], stages_of: Callable[[Variant, TrialRecord], Sequence[TrainStage]]
    ) -> None:
        """`stages_of` returns the training stages of a trial."""
        self._studies, self._stages_of = studies, stages_of
        self._hours: dict[str, float] = {}  # by the location of the stage's artifact
        self._ended: set[tuple[str, int]] = set()  # trials whose hours no longer change

    def __call__(self) -> float:
        """Return the device-hours so far."""
        for study in self._studies:
            for record in study.trials:
                trial = (study.variant.name, record.number)
                if trial not in self._ended:
                    self._read(study.variant, record)
                if record.outcome:
                    self._ended.add(trial)
        return sum(self._hours.values())

    def _read(self, variant: Variant, record: TrialRecord) -> None:
        rate = device_hours_per_second(variant.recipe.resources)
        for stage in self._stages_of(variant, record):
            path = stage.spec().path
            self._hours[path.uri] = rate * training_seconds(path, stage.spec().find())


class SearchBudget:
    """Counts what a search has spent over all its runs. The time is saved in a file in the sweep's folder.

    `hours` limits the time, `max_cost` the value that `cost` returns; None for no limit. When a limit is reached no new
    trial starts: it may be exceeded by the trials that are running.
    """

    def __init__(
        self,
        file: StoragePath,
        hours: float | None,
        max_cost: float | None = None,
        cost: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._file, self._limit_seconds = file, None if hours is None else 3600 * hours
        self._max_cost, self._cost = max_cost, cost
        self._seconds_before = json.loads(file.read_bytes())["seconds"] if file.exists() else 0.0
        self._started = time.monotonic()
        self._last_save = -math.inf

    @property
    def spent_seconds(self) -> float:
        """Return the seconds spent on the search, including earlier runs."""
        return float(self._seconds_before) + time.monotonic() - self._started

    def exhausted(self) -> bool:
        """Return whether no new trial may start. Also saves the time spent."""
        self.save()
        if self._limit_seconds is not None and self.spent_seconds >= self._limit_seconds:
            return True
        return self._max_cost is not None and self._cost() >= self._max_cost

    def save(self) -> None:
        """Write the time spent to the file, at most once a minute; does nothing without a limit of time."""
        if self._limit_seconds is not None and time.monotonic() - self._last_save > _SAVE_INTERVAL_SECONDS:
            self._last_save = time.monotonic()
            content = json.dumps({"seconds": self.spent_seconds}).encode()
            retry(lambda: self._file.write_bytes(content), _SAVE_INTERVAL_SECONDS, f"writing {self._file}")
