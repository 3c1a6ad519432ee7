"""Text from data cannot act on the terminal, secrets in URLs are not shown, odd outputs end in one line."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raylava.artifacts import Artifact
from raylava.cli import main
from raylava.cli.command import CommandResult, execute
from raylava.console import Console, escape, printable
from raylava.errors import UserError, first_line, redact_urls

EVIL = "\x1b]0;owned\x07\x1b[2J[red]x[/red]\x9b31m\r"
COMMAND = [sys.executable, "-m", "raylava.cli"]


def test_control_codes_and_markup_in_data_are_printed_as_they_are() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.say(f"[bold]model[/]: {escape(EVIL)}")
    console.error(EVIL)
    with console.stage("prepare", "rows") as bar:
        bar.say(EVIL)
    text = stream.getvalue()
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(text)
    assert text.count("[red]x[/red]") == 3
    assert text.count(r"\x1b]0;owned\x07") == 3


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
