"""How long-running work reports progress, without knowing who displays it, and how its figures are written.

`ProgressBar` and `ProgressReporter` are the interfaces; console.py renders them on a terminal, tune/trial.py sends them
to the sweep's tracker. Nothing here imports a terminal library.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

_MAX_DECIMALS = 8


class ProgressBar(Protocol):
    """Receives the progress of one stage."""

    def update(self, done: float, total: float, **metrics: float) -> None:
        """Report `done` of `total` units; `metrics` are displayed as `format_metric` writes them (loss=0.31)."""

    def say(self, text: str) -> None:
        """Log a line of plain text about the stage, at level info."""


def format_progress(done: float, total: float, unit: str, rate: float, metrics: Mapping[str, float]) -> str:
    """Return progress as a line: `120/300 steps  2.4 steps/s  1 min 15 s left  loss 0.183`.

    `rate` is in units per second, 0 while it is unknown.
    """
    parts = [f"{format_number(done)}/{format_number(total)} {unit}"]
    if rate > 0:
        parts.append(format_rate(rate, unit))
        if done < total:
            parts.append(f"{format_duration((total - done) / rate)} left")
    return "  ".join([*parts, *(format_metric(name, value) for name, value in metrics.items())])


def format_metric(name: str, value: float) -> str:
    """Return a metric with the unit in which its name ends: `loss 0.183`, `18,130 tokens/s`, `waiting for data 7 %`."""
    if name.endswith("/s"):
        return f"{format_number(value)} {name}"
    if name.endswith(" %"):
        return f"{name.removesuffix(' %')} {value:.0f} %"
    return f"{name} {format_number(value)}"


def format_rate(rate: float, unit: str) -> str:
    """Return units per second, or per minute or hour where that is easier to read; `rate` is per second."""
    periods = (("s", 1), ("min", 60), ("h", 3600))
    period, number = next(
        ((name, rate * seconds) for name, seconds in periods if rate * seconds >= 0.1), ("h", rate * 3600)
    )
    return f"{number:,.0f} {unit}/{period}" if number >= 100 else f"{number:.1f} {unit}/{period}"


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units: `45 s`, `1 min 15 s`, `2 h 5 min`, `3 d 4 h`."""
    rest = round(seconds)
    sizes = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    position = next((position for position, (_, size) in enumerate(sizes) if rest >= size), len(sizes) - 1)
    parts = []
    for unit, size in sizes[position : position + 2]:
        parts.append(f"{rest // size} {unit}")
        rest %= size
    return " ".join(part for number, part in enumerate(parts) if number == 0 or not part.startswith("0 "))


def format_number(value: float) -> str:
    """Return a number with three significant digits, all digits of its whole part, and no exponent."""
    if not math.isfinite(value) or value == int(value):
        return f"{value:,.0f}"
    decimals = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(decimals, 0), _MAX_DECIMALS)}f}"


class NullProgressBar:
    """A progress bar that displays nothing."""

    def update(self, done: float, total: float, **metrics: float) -> None:
        """Ignore the update."""

    def say(self, text: str) -> None:
        """Ignore the line."""


class ProgressReporter(Protocol):
    """Opens a progress bar for each stage and prints lines: the console, or the tracker of a sweep."""

    def say(self, text: str) -> None:
        """Print one line of rich markup."""

    def stage(self, title: str, unit: str) -> AbstractContextManager[ProgressBar]:
        """Return a progress bar that is displayed while the context is open."""


@contextmanager
def poll_in_background(poll: Callable[[], None], interval_s: float = 0.5) -> Iterator[None]:
    """Call `poll` from a thread every `interval_s` seconds while the body runs, and once more after it."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(interval_s):
            poll()

    thread = threading.Thread(target=loop, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        poll()
