"""Terminal output: progress bars with rate and ETA on standard error, tables, one-line errors.

Ray and DeepSpeed write to file descriptors 1 and 2 directly, so both are redirected to a log file and the console
writes to duplicates of the originals.
"""

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO

from rich import markup
from rich.console import Console as RichConsole
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from raylava.errors import redact_urls
from raylava.progress import ProgressBar

logger = logging.getLogger("raylava")

_TABLE_INTERVAL_S = 30.0
_LINE_INTERVAL_S = 10.0  # without a terminal, progress is a line at this interval
_WIDTH_WITHOUT_TERMINAL = 110
# Control codes would let a text move the cursor, change the window's title or hide other text.
_CONTROL_CODES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Return a text with terminal control codes, except new lines and tabs, as escape sequences such as \\x1b."""
    return text.encode(errors="backslashreplace").decode().translate(_CONTROL_CODES)


def escape(text: str) -> str:
    """Return a text from data so that a console prints it as it is: markup and control codes have no effect."""
    return markup.escape(printable(text))


class Console:
    """The output of one command.

    `stream` is standard error of the terminal, `out` its standard output (default: `stream`), and `log` the file with
    all other output.
    """

    def __init__(self, stream: TextIO, log: Path | None = None, *, out: TextIO | None = None) -> None:
        width = None if stream.isatty() else _WIDTH_WITHOUT_TERMINAL
        self.stream = stream
        self._out = out or stream
        self._rich = RichConsole(file=stream, width=width, highlight=False, emoji=False)
        self.log = log

    def say(self, text: str) -> None:
        """Print one line of rich markup. Long lines are not wrapped, so that paths can be copied."""
        self._rich.print(text, soft_wrap=True)

    def write(self, text: str) -> None:
        """Write a text as it is, without an end of line: a prompt, or what a person asked for."""
        self.stream.write(printable(text))
        self.stream.flush()

    def print_result(self, text: str) -> None:
        """Print a result on standard output as it is, before the command ends."""
        self._out.write(printable(redact_urls(text)) + "\n")
        self._out.flush()

    def show(self, table: Table) -> None:
        """Print a table."""
        self._rich.print(table)

    def error(self, text: str) -> None:
        """Print an error as one line."""
        self._rich.print(f"[bold red]error[/]: {escape(redact_urls(text))}", soft_wrap=True)

    @contextmanager
    def stage(self, title: str, unit: str) -> Iterator[ProgressBar]:
        """Display a live bar on a terminal; elsewhere print a line at the start, every 10 seconds and at the end."""
        if self._rich.is_terminal:
            with _rich_progress(self._rich) as progress:
                yield _LiveBar(progress, progress.add_task(f"{title:<20}", total=None, metrics=""), unit)
        else:
            bar = _LineBar(self._rich, title, unit)
            yield bar
            bar.finish()

    @contextmanager
    def live(self, render: Callable[[], Table]) -> Iterator[Callable[[], None]]:
        """Yield a function that redraws the table; without a terminal it prints the table every 30 seconds."""
        if self._rich.is_terminal:
            with Live(render(), console=self._rich, auto_refresh=False) as live:
                yield lambda: live.update(render(), refresh=True)
                live.update(render(), refresh=True)
            return
        printed_at = time.monotonic()

        def print_periodically() -> None:
            nonlocal printed_at
            if time.monotonic() - printed_at >= _TABLE_INTERVAL_S:
                printed_at = time.monotonic()
                self._rich.print(render())

        yield print_periodically
        self._rich.print(render())


def _rich_progress(console: RichConsole) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[metrics]}"),
        TimeRemainingColumn(),
        console=console,
    )


class _RateMeter:
    """Units per second since the first update, so that work restored from an earlier run does not count."""

    def __init__(self) -> None:
        self._start: tuple[float, float] | None = None

    def rate(self, done: float) -> float:
        now = time.monotonic()
        if self._start is None:
            self._start = (now, done)
        started_at, first = self._start
        return (done - first) / (now - started_at) if now > started_at else 0.0


def _format_metrics(rate: float, unit: str, metrics: dict[str, float]) -> str:
    parts = [f"{rate:.1f} {unit}/s"] if rate else []
    return "  ".join(parts + [f"{name} {value:.4g}" for name, value in metrics.items()])


def _print_detail(console: RichConsole, text: str) -> None:
    console.print(f"  [dim]{escape(text)}[/]", soft_wrap=True)


class _LiveBar:
    """A rich progress bar on a terminal."""

    def __init__(self, progress: Progress, task: TaskID, unit: str) -> None:
        self._progress, self._task, self._unit, self._meter = progress, task, unit, _RateMeter()

    def update(self, done: float, total: float, **metrics: float) -> None:
        text = _format_metrics(self._meter.rate(done), self._unit, metrics)
        self._progress.update(self._task, completed=done, total=total, metrics=text)

    def say(self, text: str) -> None:
        _print_detail(self._progress.console, text)


class _LineBar:
    """Progress as lines, for output that is not a terminal."""

    def __init__(self, console: RichConsole, title: str, unit: str) -> None:
        self._console, self._title, self._unit, self._meter = console, title, unit, _RateMeter()
        self._printed_at = -_LINE_INTERVAL_S
        self._line = ""
        self._pending = False

    def update(self, done: float, total: float, **metrics: float) -> None:
        rate = self._meter.rate(done)
        eta = f"  ETA {(total - done) / rate:.0f} s" if rate and done < total else ""
        text = _format_metrics(rate, self._unit, metrics)
        self._line = f"{self._title}: {done:g}/{total:g} {self._unit}  {text}{eta}"
        self._pending = True
        if time.monotonic() - self._printed_at >= _LINE_INTERVAL_S:
            self._print()

    def say(self, text: str) -> None:
        _print_detail(self._console, text)

    def finish(self) -> None:
        if self._pending:
            self._print()

    def _print(self) -> None:
        self._console.print(escape(self._line), soft_wrap=True)
        self._printed_at = time.monotonic()
        self._pending = False


class ConsoleLogHandler(logging.Handler):
    """Shows raylava's own warnings on the console; records of other libraries stay in the log file."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.say(f"[yellow]{record.levelname.lower()}[/]: {escape(redact_urls(record.getMessage()))}")


class _RedactingFormatter(logging.Formatter):
    """Formats log records, tracebacks included, without secrets in URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_urls(super().format(record))


@contextmanager
def redirect_output(log: Path) -> Iterator[tuple[IO[str], Console]]:
    """Redirect file descriptors 1 and 2 to `log`; yield (standard output, a console on standard error)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    originals = [os.dup(1), os.dup(2)]
    out, err = (
        os.fdopen(os.dup(descriptor), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        for descriptor in originals
    )
    log_descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(log_descriptor, descriptor)
    os.close(log_descriptor)
    console = Console(err, log, out=out)
    console_handler, file_handler = _attach_log_handlers(console, log)
    try:
        with warnings.catch_warnings():
            yield out, console
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), originals, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        for stream in (out, err):
            with contextlib.suppress(OSError):  # a closed pipe, or a full disk that the command has reported
                stream.close()
        logger.removeHandler(console_handler)
        logging.getLogger().removeHandler(file_handler)
        file_handler.close()


def _attach_log_handlers(console: Console, log: Path) -> tuple[logging.Handler, logging.Handler]:
    console_handler = ConsoleLogHandler(console)
    file_handler = logging.FileHandler(log, encoding="utf-8", errors="backslashreplace")
    file_handler.setFormatter(_RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(console_handler)
    logger.setLevel(logging.INFO)
    logging.getLogger().addHandler(file_handler)
    return console_handler, file_handler
