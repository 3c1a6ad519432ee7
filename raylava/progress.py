"""How long-running work reports progress, without knowing who displays it.

`ProgressBar` and `ProgressReporter` are the interfaces; console.py renders them on a terminal, tune/trial.py sends them
to the sweep's tracker. Nothing here imports a terminal library.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class ProgressBar(Protocol):
    """Receives the progress of one stage."""

    def update(self, done: float, total: float, **metrics: float) -> None:
        """Report `done` of `total` units; `metrics` are displayed by name (loss=0.31)."""

    def say(self, text: str) -> None:
        """Display a line of plain text about the stage."""


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
