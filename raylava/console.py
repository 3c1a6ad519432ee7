"""Terminal output: progress with rate and time left on standard error, tables, one-line errors.

Ray and DeepSpeed write to file descriptors 1 and 2 directly, so both are redirected to a log file and the console
writes to duplicates of the originals.
"""

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO

from rich import markup
from rich.console import Console as RichConsole
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from raylava.errors import redact_urls
from raylava.progress import NullProgressBar, ProgressBar, format_progress

logger = logging.getLogger("raylava")

_LEVEL_STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}
_LINE_INTERVAL_S = 10.0  # without a terminal, progress is a line at this interval
_MIN_MEASURED_S = 0.5
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
    all other output. A quiet console shows results and errors only: neither messages nor progress.
    """

    def __init__(
        self, stream: TextIO, log: Path | None = None, *, out: TextIO | None = None, quiet: bool = False
    ) -> None:
        width = None if stream.isatty() else _WIDTH_WITHOUT_TERMINAL
        self.stream = stream
        self._out = out or stream
        self._rich = RichConsole(file=stream, width=width, highlight=False, emoji=False)
        self.log = log
        self.quiet = quiet

    def say(self, text: str) -> None:
        """Print a message, one line of rich markup. Long lines are not wrapped, so that paths can be copied."""
        if not self.quiet:
            self._rich.print(text, soft_wrap=True)

    def write(self, text: str) -> None:
        """Write a text unchanged, without an end of line: a prompt, or what a person asked for."""
        self.stream.write(printable(text))
        self.stream.flush()

    def print_result(self, text: str) -> None:
        """Print a result unchanged on standard output, before the command ends."""
        self._out.write(printable(redact_urls(text)) + "\n")
        self._out.flush()

    def show(self, result: Table | str) -> None:
        """Print a table or a line of rich markup that belongs to the command's result, also on a quiet console."""
        self._rich.print(result, soft_wrap=isinstance(result, str))

    def show_log_record(self, level: int, text: str) -> None:
        """Print a log record as one line."""
        name, style = logging.getLevelName(level).lower(), _LEVEL_STYLES.get(level, "dim")
        self._rich.print(f"[{style}]{name}[/]: {escape(redact_urls(text))}", soft_wrap=True)

    def error(self, text: str) -> None:
        """Print an error as one line."""
        self._rich.print(f"[bold red]error[/]: {escape(redact_urls(text))}", soft_wrap=True)

    @contextmanager
    def stage(self, title: str, unit: str) -> Iterator[ProgressBar]:
        """Display a live bar on a terminal; elsewhere print a line at the start, every 10 seconds and at the end."""
        if self.quiet:
            yield _Bar(title, unit)
        elif self._rich.is_terminal:
            with _rich_progress(self._rich) as progress:
                yield _LiveBar(progress, title, unit)
        else:
            bar = _LineBar(self._rich, title, unit)
            yield bar
            bar.finish()

    @contextmanager
    def live(
        self, render: Callable[[], Table], list_states: Callable[[], Mapping[str, str]]
    ) -> Iterator[Callable[[], None]]:
        """Yield a function that shows the current state of several tasks.

        It redraws the table on a terminal. Elsewhere it prints a line for each task of `list_states` (state by name)
        whose state has changed, and the table is printed once, at the end.
        """
        if self.quiet:
            yield lambda: None
            return
        if self._rich.is_terminal:
            with Live(render(), console=self._rich, auto_refresh=False) as live:
                yield lambda: live.update(render(), refresh=True)
                live.update(render(), refresh=True)
            return
        shown: dict[str, str] = {}

        def print_changes() -> None:
            for name, state in list_states().items():
                if shown.get(name) != state:
                    shown[name] = state
                    self.say(f"{escape(name)}: {escape(state)}")

        yield print_changes
        print_changes()
        self._rich.print(render())


def _rich_progress(console: RichConsole) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=20 if console.width >= _WIDTH_WITHOUT_TERMINAL else 8),
        TextColumn("{task.fields[line]}", markup=False),
        console=console,
    )


class _RateMeter:
    """Units per second since the first update, so that work restored from an earlier run does not count.

    The rate is 0 until it has been measured for half a second: updates of a remote worker arrive several at once.
    """

    def __init__(self) -> None:
        self._start: tuple[float, float] | None = None

    def rate(self, done: float) -> float:
        now = time.monotonic()
        if self._start is None:
            self._start = (now, done)
        started_at, first = self._start
        return (done - first) / (now - started_at) if now - started_at >= _MIN_MEASURED_S else 0.0


class _Bar(NullProgressBar):
    """A progress bar that displays nothing, but logs what is said."""

    def __init__(self, title: str, unit: str) -> None:
        self._title, self._unit, self._meter = title, unit, _RateMeter()

    def say(self, text: str) -> None:
        logger.info("%s: %s", self._title, text)

    def _format(self, done: float, total: float, metrics: Mapping[str, float]) -> str:
        return format_progress(done, total, self._unit, self._meter.rate(done), metrics)


class _LiveBar(_Bar):
    """A rich progress bar on a terminal."""

    def __init__(self, progress: Progress, title: str, unit: str) -> None:
        super().__init__(title, unit)
        self._progress, self._task = progress, progress.add_task(f"{escape(title):<12}", total=None, line="starting")

    def update(self, done: float, total: float, **metrics: float) -> None:
        self._progress.update(self._task, completed=done, total=total, line=self._format(done, total, metrics))


class _LineBar(_Bar):
    """Progress as lines, for output that is not a terminal."""

    def __init__(self, console: RichConsole, title: str, unit: str) -> None:
        super().__init__(title, unit)
        self._console = console
        self._pending: str | None = None
        self._print("starting")

    def update(self, done: float, total: float, **metrics: float) -> None:
        self._pending = self._format(done, total, metrics)
        if time.monotonic() - self._printed_at >= _LINE_INTERVAL_S:
            self._print(self._pending)

    def finish(self) -> None:
        if self._pending is not None:
            self._print(self._pending)

    def _print(self, line: str) -> None:
        self._console.print(escape(f"{self._title}  {line}"), soft_wrap=True)
        self._printed_at = time.monotonic()
        self._pending = None


class ConsoleLogHandler(logging.Handler):
    """Shows raylava's own records on the console; records of other libraries stay in the log file."""

    def __init__(self, console: Console, level: int = logging.WARNING) -> None:
        super().__init__(max(level, logging.ERROR) if console.quiet else level)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.show_log_record(record.levelno, record.getMessage())


class _RedactingFormatter(logging.Formatter):
    """Formats log records, tracebacks included, without secrets in URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_urls(super().format(record))


@contextmanager
def redirect_output(
    log: Path, quiet: bool = False, log_level: int = logging.WARNING
) -> Iterator[tuple[IO[str], Console]]:
    """Redirect file descriptors 1 and 2 to `log`; yield (standard output, a console on standard error).

    The console shows raylava's log records of `log_level` and above; a quiet one shows errors and results only.
    """
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
    console = Console(err, log, out=out, quiet=quiet)
    console_handler, file_handler = _attach_log_handlers(console, log, log_level)
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


def _attach_log_handlers(console: Console, log: Path, log_level: int) -> tuple[logging.Handler, logging.Handler]:
    console_handler = ConsoleLogHandler(console, log_level)
    file_handler = logging.FileHandler(log, encoding="utf-8", errors="backslashreplace")
    file_handler.setFormatter(_RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(console_handler)
    logger.setLevel(min(logging.INFO, log_level))
    logging.getLogger().addHandler(file_handler)
    return console_handler, file_handler
