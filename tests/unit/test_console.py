"""Text from data cannot act on the terminal, secrets are not shown, odd outputs and progress are one line."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from raylava.artifacts import Artifact
from raylava.cli import main
from raylava.cli.command import CommandResult, execute
from raylava.console import Console, escape, printable, redirect_output
from raylava.errors import UserError, first_line, redact_urls
from raylava.progress import format_duration, format_metric, format_number, format_progress, format_rate

EVIL = "\x1b]0;owned\x07\x1b[2J[red]x[/red]\x9b31m\r"
COMMAND = [sys.executable, "-m", "raylava.cli"]


def test_control_codes_and_markup_in_data_are_printed_as_they_are() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.say(f"[bold]model[/]: {escape(EVIL)}")
    console.error(EVIL)
    console.show_log_record(logging.INFO, EVIL)
    with console.stage(EVIL, "rows") as bar:
        bar.update(1, 2)
    with console.live(Table, lambda: {EVIL: EVIL}):
        pass
    text = stream.getvalue()
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(text)
    assert text.count("[red]x[/red]") == 7
    assert text.count(r"\x1b]0;owned\x07") == 7


def test_answer_of_a_model_cannot_move_the_cursor_but_keeps_its_lines(capfd: pytest.CaptureFixture[str]) -> None:
    assert execute("chat", False, lambda _: CommandResult({}, f"two\nlines\t{EVIL}")) == 0
    assert capfd.readouterr().out == "two\nlines\t" + printable(EVIL) + "\n"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://user:p@ss@host/db", "postgresql://…@host/db"),
        ("https://ghp_token@github.com/x", "https://…@github.com/x"),
        (
            "https://bucket.s3.amazonaws.com/a.jpg?X-Amz-Signature=ab&X-Amz-Date=1",
            "https://bucket.s3.amazonaws.com/a.jpg?…",
        ),
        ("https://host/a.jpg?sig=ab%3D&se=2026", "https://host/a.jpg?…"),
        ("s3://AKIA:ab/cd@bucket/x", "s3://…@bucket/x"),
        ("https://host/a#access_token=abc", "https://host/a#…"),
        ("abfss://container@account.dfs.core.windows.net/p", "abfss://container@account.dfs.core.windows.net/p"),
        ("https://host/a.jpg?id=3&size=big", "https://host/a.jpg?id=3&size=big"),
        ("s3://bucket/design/x", "s3://bucket/design/x"),
        ("two: http://a:b@c/d and http://e@f", "two: http://…@c/d and http://…@f"),
        ("no url: a@b?token=c", "no url: a@b?token=c"),
    ],
)
def test_users_and_signed_queries_of_urls_are_not_shown(url: str, shown: str) -> None:
    assert redact_urls(url) == shown
    assert first_line(UserError(f"cannot read {url}")) == f"cannot read {shown}"


def test_secrets_in_urls_stay_out_of_the_terminal_and_the_log_with_its_traceback(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(_: Console) -> CommandResult:
        raise RuntimeError("cannot reach https://user:hunter2@host/x?token=abc123")

    assert execute("run", False, fail) == 1
    (log,) = (tmp_path / "raylava" / "logs").iterdir()
    output = capfd.readouterr().err + log.read_text()
    assert "Traceback" in output
    assert "https://…@host/x?…" in output
    assert "hunter2" not in output
    assert "abc123" not in output


def test_closed_pipe_ends_a_command_without_a_word(toy_assets: Artifact) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [*COMMAND, "show", str(toy_assets.path)]
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (process.returncode, process.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_is_reported_and_is_no_success(toy_assets: Artifact) -> None:
    with open("/dev/full", "w") as full:
        command = [*COMMAND, "show", str(toy_assets.path)]
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr.startswith("error: OSError: [Errno 28] No space left on device")
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("cache", ["/dev/null", "/proc/none"])
def test_cache_that_cannot_be_written_does_not_end_a_command_that_needs_none(
    cache: str, toy_assets: Artifact, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    assert main(["show", str(toy_assets.path)]) == 0
    assert json.loads(capfd.readouterr().out)["fingerprint_fields"]


def test_file_error_names_the_file_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(_: Console) -> CommandResult:
        Path("/proc/none/x").write_text("")
        raise AssertionError

    assert execute("run", False, fail) == 1
    assert capfd.readouterr().err.startswith("error: /proc/none/x: No such file or directory\n")


def test_long_texts_are_redacted_in_linear_time() -> None:
    assert redact_urls("a" * 200_000 + " ://" + "b" * 200_000).count("b") == 200_000


def test_json_output_has_no_control_codes_no_secrets_and_reads_back(capfd: pytest.CaptureFixture[str]) -> None:
    data = {"text": EVIL, "lone": "\ud800", "url": "https://user:hunter2@host/x"}
    assert execute("show", True, lambda _: CommandResult(data)) == 0
    output = capfd.readouterr().out
    assert not {"\x1b", "\x9b"} & set(output)
    assert "hunter2" not in output
    assert json.loads(output) == data | {"url": "https://…@host/x"}


def test_emoji_codes_in_data_are_not_replaced() -> None:
    stream = io.StringIO()
    Console(stream).say(escape("coco:train:2014"))
    assert stream.getvalue() == "coco:train:2014\n"


class Terminal(io.StringIO):
    """A stream that a console takes for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the console sees, in seconds; a test moves it."""
    now = [1000.0]
    monkeypatch.setattr("raylava.console.time.monotonic", lambda: now[0])
    return now


def test_progress_is_one_line_of_stage_steps_rate_time_left_and_main_figures() -> None:
    metrics = {"loss": 0.18283, "tokens/s": 18130.4, "waiting for data %": 7.49}
    assert format_progress(120, 300, "steps", 2.4, metrics) == (
        "120/300 steps  2.4 steps/s  1 min 15 s left  loss 0.183  18,130 tokens/s  waiting for data 7 %"
    )
    assert format_progress(0, 558128, "rows", 0.0, {"quarantined": 0}) == "0/558,128 rows  quarantined 0"
    assert format_progress(300, 300, "steps", 2.4, {}) == "300/300 steps  2.4 steps/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (75, "1 min 15 s"),
        (3599.7, "1 h"),
        (7500, "2 h 5 min"),
        (90000, "1 d 1 h"),
        (1e6, "11 d 13 h"),
    ],
)
def test_durations_are_in_the_units_that_people_use(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (2.44, "2.4 steps/s"),
        (765.1, "765 steps/s"),
        (12345.6, "12,346 steps/s"),
        (0.02, "1.2 steps/min"),
        (0.0005, "1.8 steps/h"),
        (1e-9, "0.0 steps/h"),
    ],
)
def test_rates_are_per_second_minute_or_hour(rate: float, text: str) -> None:
    assert format_rate(rate, "steps") == text


@pytest.mark.parametrize("exponent", range(-12, 16))
@pytest.mark.parametrize("digits", [1.0, 1.2345, 9.9999, -3.3])
def test_numbers_are_never_in_e_notation(digits: float, exponent: int) -> None:
    value = digits * 10.0**exponent
    text = format_number(value)
    assert "e" not in text + format_metric("loss", value)
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.006, abs=1e-8)


def test_loss_that_is_not_finite_is_shown_as_such() -> None:
    assert [format_metric("loss", value) for value in (float("nan"), float("inf"))] == ["loss nan", "loss inf"]


def test_without_a_terminal_progress_is_a_line_at_the_start_every_10_seconds_and_at_the_end(clock: list[float]) -> None:
    stream = io.StringIO()
    with Console(stream).stage("finetune", "steps") as bar:
        for step in range(1, 25):
            clock[0] += 1.0
            bar.update(step, 24, loss=0.5)
    assert stream.getvalue().splitlines() == [
        "finetune  starting",
        "finetune  10/24 steps  1.0 steps/s  14 s left  loss 0.500",
        "finetune  20/24 steps  1.0 steps/s  4 s left  loss 0.500",
        "finetune  24/24 steps  1.0 steps/s  loss 0.500",
    ]


def test_rate_is_not_shown_before_it_is_known(clock: list[float]) -> None:
    """Updates that arrive at once, as those of a remote worker do, give no rate."""
    stream = io.StringIO()
    with Console(stream).stage("finetune", "steps") as bar:
        for step in (1, 2, 3):
            clock[0] += 1e-5
            bar.update(step, 3)
    assert stream.getvalue().splitlines() == ["finetune  starting", "finetune  3/3 steps"]


def test_terminal_shows_the_same_line_beside_a_bar(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Console(stream).stage("finetune", "steps") as bar:
        bar.update(1, 24, loss=0.5)
        clock[0] += 1.0
        bar.update(2, 24, loss=0.5)
    assert "2/24 steps  1.0 steps/s  22 s left  loss 0.500" in stream.getvalue()


def test_without_a_terminal_each_change_of_a_state_is_a_line_and_the_table_comes_once_at_the_end() -> None:
    states = {"trial 0": "starting"}
    stream = io.StringIO()
    with Console(stream).live(lambda: Table("trials", title="the table"), lambda: states) as refresh:
        refresh()
        refresh()
        states |= {"trial 0": "finetune", "trial 1": "starting"}
        refresh()
        refresh()
        states["trial 1"] = "failed"
    lines = [line.strip() for line in stream.getvalue().splitlines()]
    changes = ["trial 0: starting", "trial 0: finetune", "trial 1: starting", "trial 1: failed"]
    assert lines[: len(changes)] == changes
    assert lines[len(changes) :].count("the table") == 1
    assert len([line for line in lines if line.startswith("trial ")]) == len(changes)


@pytest.mark.parametrize("level", [logging.WARNING, logging.INFO])
@pytest.mark.parametrize("quiet", [False, True])
def test_lines_about_a_stage_are_in_the_log_file_and_shown_at_level_info_only(
    level: int, quiet: bool, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "run.log"
    with redirect_output(log, quiet, level) as (_, console), console.stage("finetune", "steps") as bar:
        bar.say("attention: varlen")
    assert "INFO raylava: finetune: attention: varlen\n" in log.read_text()
    shown = level == logging.INFO and not quiet
    assert ("info: finetune: attention: varlen\n" in capfd.readouterr().err) == shown
