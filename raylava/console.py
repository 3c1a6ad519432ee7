"""What a person sees: progress with rate and ETA on standard error, tables, one-line errors.

Ray's and DeepSpeed's chatter goes to a log file: both write to the process's own descriptors 1 and 2, so these are
pointed at the file and the person gets copies of the originals.
"""

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Protocol, TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

logger = logging.getLogger("raylava")

_TABLE_EVERY_SECONDS = 30.0
_LINE_EVERY_SECONDS = 10.0  # without a terminal, progress is a line now and then


class ProgressBar(Protocol):
    """TrialStatus a stage reports how far it is."""

    def update(self, done: float, total: float, **figures: float) -> None:
        """`done` of `total` units; `figures` are shown by name (loss=0.31)."""


class NullProgressBar:
    """A bar that shows nothing, for callers without a person."""

    def update(self, done: float, total: float, **figures: float) -> None:
        """Nothing."""


@contextmanager
def poll_in_background(show: Callable[[], None], seconds: float = 0.5) -> Iterator[None]:
    """Call `show` now and then, from a thread, while the body blocks; and once after it."""
    stopping = threading.Event()

    def keep_showing() -> None:
        while not stopping.wait(seconds):
            show()

    thread = threading.Thread(target=keep_showing, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
        show()


class ProgressReporter(Protocol):
    """Where a stage that is made shows itself: a person's console, or a trial of a sweep."""

    def say(self, text: str) -> None:
        """A line (rich markup)."""

    def stage(self, title: str, unit: str) -> AbstractContextManager[ProgressBar]:
        """A bar for as long as the stage lasts."""


class Console:
    """One person's view of one command."""

    def __init__(self, stream: TextIO, log: Path | None = None) -> None:
        width = None if stream.isatty() else 110
        self.stream = stream
        self._rich = RichConsole(file=stream, width=width, highlight=False)
        self.log = log

    def say(self, text: str) -> None:
        """A line (rich markup)."""
        self._rich.print(text, soft_wrap=True)  # paths stay whole, to be copied

    def show(self, table: Table) -> None:
        """A table."""
        self._rich.print(table)

    def error(self, text: str) -> None:
        """The one line of an error."""
        self._rich.print(f"[bold red]error[/]: {escape(text)}", soft_wrap=True)

    @contextmanager
    def stage(self, title: str, unit: str) -> Iterator[ProgressBar]:
        """A live bar on a terminal; elsewhere a line at the start, every ten seconds and at the end."""
        if self._rich.is_terminal:
            with _live(self._rich) as progress:
                yield _LiveBar(progress, progress.add_task(f"{title:<20}", total=None, figures=""), unit)
        else:
            bar = _LineBar(self._rich, title, unit)
            yield bar
            bar.finish()

    @contextmanager
    def live_nodes(self, render: Callable[[], Table]) -> Iterator[Callable[[], None]]:
        """A table that is drawn anew with each call of what this yields; without a terminal, now and then."""
        if self._rich.is_terminal:
            with Live(render(), console=self._rich, auto_refresh=False) as live:
                yield lambda: live.update(render(), refresh=True)
                live.update(render(), refresh=True)
            return
        shown_at = time.monotonic()

        def now_and_then() -> None:
            nonlocal shown_at
            if time.monotonic() - shown_at >= _TABLE_EVERY_SECONDS:
                shown_at = time.monotonic()
                self._rich.print(render())

        yield now_and_then
        self._rich.print(render())


def _live(console: RichConsole) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
    )


class _Meter:
    """Units a second since the first report, so that work found done from an earlier run does not count."""

    def __init__(self) -> None:
        self._start: tuple[float, float] | None = None

    def rate(self, done: float) -> float:
        now = time.monotonic()
        if self._start is None:
            self._start = (now, done)
        since, first = self._start
        return (done - first) / (now - since) if now > since else 0.0


def _figures(rate: float, unit: str, figures: dict[str, float]) -> str:
    shown = [f"{rate:.1f} {unit}/s"] if rate else []
    return "  ".join(shown + [f"{name} {value:.4g}" for name, value in figures.items()])


class _LiveBar:
    def __init__(self, progress: Progress, task: TaskID, unit: str) -> None:
        self._progress, self._task, self._unit, self._meter = progress, task, unit, _Meter()

    def update(self, done: float, total: float, **figures: float) -> None:
        text = _figures(self._meter.rate(done), self._unit, figures)
        self._progress.update(self._task, completed=done, total=total, figures=text)


class _LineBar:
    def __init__(self, console: RichConsole, title: str, unit: str) -> None:
        self._console, self._title, self._unit, self._meter = console, title, unit, _Meter()
        self._shown_at = -_LINE_EVERY_SECONDS
        self._last = ""
        self._hidden = False

    def update(self, done: float, total: float, **figures: float) -> None:
        rate = self._meter.rate(done)
        eta = f"  ETA {(total - done) / rate:.0f} s" if rate and done < total else ""
        self._last = f"{self._title}: {done:g}/{total:g} {self._unit}  {_figures(rate, self._unit, figures)}{eta}"
        self._hidden = True
        if time.monotonic() - self._shown_at >= _LINE_EVERY_SECONDS:
            self._show()

    def finish(self) -> None:
        if self._hidden:
            self._show()

    def _show(self) -> None:
        self._console.print(escape(self._last), soft_wrap=True)
        self._shown_at = time.monotonic()
        self._hidden = False


class ConsoleLogHandler(logging.Handler):
    """Our own warnings go to the person; other libraries' stay in the log file."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.say(f"[yellow]{record.levelname.lower()}[/]: {escape(record.getMessage())}")


@contextmanager
def quiet(log: Path) -> Iterator[tuple[IO[str], Console]]:
    """(standard output, a console on standard error) for the person; all else that is written goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    out, err = (os.fdopen(os.dup(descriptor), "w", encoding="utf-8", buffering=1) for descriptor in kept)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(sink, descriptor)
    os.close(sink)
    console = Console(err, log)
    handlers = _listen(console, log)
    try:
        with warnings.catch_warnings():
            yield out, console
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), kept, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        out.close()
        err.close()
        logger.removeHandler(handlers[0])
        logging.getLogger().removeHandler(handlers[1])
        handlers[1].close()


def _listen(console: Console, log: Path) -> tuple[logging.Handler, logging.Handler]:
    to_person = ConsoleLogHandler(console)
    to_file = logging.FileHandler(log)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(to_person)
    logger.setLevel(logging.INFO)
    logging.getLogger().addHandler(to_file)
    return to_person, to_file
