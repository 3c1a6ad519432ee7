"""The budget of a search in hours and in money, over all its runs."""

import json
import math
import time

from raylava.storage import StoragePath, retry

_SAVE_INTERVAL_SECONDS = 60.0


class SearchBudget:
    """Counts what a search has spent. The counts of all its runs are saved in a file in the sweep's folder.

    `hours` limits the time, `max_cost` the price of the device-hours of training, at `price` for one; None for no
    limit. When a limit is reached no new trial starts: the cost may exceed it by that of the trials that are running.
    """

    def __init__(
        self, file: StoragePath, hours: float | None, max_cost: float | None = None, price: float | None = None
    ) -> None:
        assert max_cost is None or price is not None, "the command line refuses max_cost without prices"
        self._file, self._limit_seconds = file, None if hours is None else 3600 * hours
        self._max_cost, self._price = max_cost, price
        self._limited = hours is not None or max_cost is not None
        saved = json.loads(file.read_bytes()) if file.exists() else {}
        self._seconds_before: float = saved.get("seconds", 0.0)
        self.device_hours: float = saved.get("device_hours", 0.0)
        self._started = time.monotonic()
        self._last_save = -math.inf

    @property
    def spent_seconds(self) -> float:
        """Return the seconds spent on the search, including earlier runs."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def cost(self) -> float:
        """Return the price of the device-hours of the trials that have ended, including earlier runs."""
        return self.device_hours * (self._price or 0.0)

    def add_device_hours(self, device_hours: float) -> None:
        """Count the device-hours of a trial that has ended, and save them."""
        self.device_hours += device_hours
        self._last_save = -math.inf
        self.save()

    def exhausted(self) -> bool:
        """Return whether no new trial may start. Also saves the counts."""
        self.save()
        out_of_time = self._limit_seconds is not None and self.spent_seconds >= self._limit_seconds
        return out_of_time or (self._max_cost is not None and self.cost >= self._max_cost)

    def save(self) -> None:
        """Write the counts to the file, at most once a minute; does nothing without a limit."""
        if self._limited and time.monotonic() - self._last_save > _SAVE_INTERVAL_SECONDS:
            self._last_save = time.monotonic()
            content = json.dumps({"seconds": self.spent_seconds, "device_hours": self.device_hours}).encode()
            retry(lambda: self._file.write_bytes(content), _SAVE_INTERVAL_SECONDS, f"writing {self._file}")
