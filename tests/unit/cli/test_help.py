"""Help texts: commands in groups, an example for each, which the parser accepts; and the global options."""

import importlib.metadata
import io
import logging
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import raylava
from raylava.cli import main
from raylava.cli.app import app
from raylava.cli.command import CommandResult, OutputOptions, execute, output_options
from raylava.console import Console

PARSER = typer.main.get_command(app)
CALL = re.compile(r"""(?:^|\s|\()raylava\b(?P<arguments>(?:[^)"]|"[^"]*")*)""")  # also in eval "$(raylava …)"
logger = logging.getLogger("raylava.test_help")


def commands(parser: typer.core.TyperCommand, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Return the help text of every command and group by its path."""
    subcommands = getattr(parser, "commands", {})
    found = {path: parser.help or ""}
    for name, command in subcommands.items():
        found |= commands(command, (*path, name))
    return found


HELP = commands(PARSER)


def examples(path: tuple[str, ...]) -> list[str]:
    block = re.search(r"^Examples?:\n((?:.+\n?)+)", HELP[path], re.MULTILINE)
    return block[1].splitlines() if block else []


def arguments(example: str) -> list[str]:
    call = CALL.search(example)
    assert call, example
    return shlex.split(call["arguments"])


def parse(words: list[str]) -> tuple[str, ...]:
    """Parse a command line without running it, and return the path of its command."""
    parser, context, path = PARSER, PARSER.make_context("raylava", list(words)), ()
    while hasattr(parser, "commands"):
        rest = [*context._protected_args, *context.args]
        if not rest:
            return path  # a group that is a command itself
        name, parser, rest = parser.resolve_command(context, rest)
        context = parser.make_context(name, rest, parent=context)
        path = (*path, name)
    return path


@pytest.mark.parametrize("path", HELP, ids=" ".join)
def test_every_command_has_an_example_that_the_parser_accepts(path: tuple[str, ...]) -> None:
    assert examples(path)
    parsed = [parse(arguments(example)) for example in examples(path)]
    assert all(command[: len(path)] == path for command in parsed), parsed


@pytest.mark.parametrize("words", [["run"], ["run", "toy", "--nonsense"], ["recipes", "copy", "toy"], ["dance"]])
def test_parser_of_these_tests_refuses_what_the_command_line_refuses(words: list[str]) -> None:
    with pytest.raises(typer.exceptions.TyperException):
        parse(words)


@pytest.mark.parametrize("path", HELP, ids=" ".join)
def test_examples_are_rendered_as_a_block_of_their_own(path: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "raylava", *path, "--help"]
    environment = {"COLUMNS": "80", "PATH": "", "PYTHONPATH": str(Path(raylava.__file__).parents[1])}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    lines = [line.strip() for line in output.splitlines()]
    title = next(number for number, line in enumerate(lines) if line in ("Example:", "Examples:"))
    assert lines[title - 1] == ""
    shown = examples(path)
    assert lines[title + 1 : title + 1 + len(shown)] == shown
    assert lines[title + 1 + len(shown)] == ""


def test_help_lists_commands_in_groups(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capfd.readouterr().out
    panels = re.findall(r"^╭─ (.+?) ─+╮$", output, re.MULTILINE)
    assert panels[0] == "Options"
    assert panels[1:] == ["Start here", "Train and evaluate", "Sweeps", "Inspect results", "Clusters and jobs"]
    listed = re.findall(r"^│ ([a-z][a-z-]+) ", output, re.MULTILINE)
    assert set(listed) == {path[0] for path in HELP if path}


def test_version_lists_the_libraries(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    libraries = ("ray", "torch", "transformers", "deepspeed")
    versions = [f"{library} {importlib.metadata.version(library)}" for library in libraries]
    expected = [f"raylava {raylava.__version__}", f"Python {platform.python_version()}", *versions]
    assert capfd.readouterr().out.splitlines() == expected


def body(console: Console) -> CommandResult:
    logger.info("an info record")
    logger.warning("a warning")
    logger.error("an error record")
    console.say("a message")
    console.show("a result line")
    with console.stage("finetune", "steps") as bar:
        bar.update(1, 2, loss=0.5)
    return CommandResult({}, "the result")


@pytest.mark.parametrize(
    ("options", "shown", "hidden"),
    [
        (OutputOptions(), ["warning: a warning", "error: an error record", "a message", "finetune"], ["info"]),
        (OutputOptions(log_level=logging.INFO), ["info: an info record", "warning: a warning"], []),
        (OutputOptions(log_level=logging.ERROR), ["error: an error record", "a message"], ["warning", "info"]),
        (OutputOptions(quiet=True), ["error: an error record"], ["warning", "info", "a message", "finetune"]),
    ],
    ids=["default", "info", "error", "quiet"],
)
def test_quiet_and_log_level_select_what_is_shown(
    options: OutputOptions, shown: list[str], hidden: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    token = output_options.set(options)
    try:
        assert execute("run", False, body) == 0
    finally:
        output_options.reset(token)
    output = capfd.readouterr()
    assert output.out == "the result\n"
    assert "a result line" in output.err
    assert not [text for text in shown if text not in output.err]
    assert not [text for text in hidden if text in output.err]


@pytest.mark.parametrize(
    "words",
    [
        ["--quiet", "--log-level", "info", "recipes"],
        ["recipes", "--quiet", "--log-level=info"],
        ["recipes", "--log-level", "info", "--quiet"],
    ],
)
def test_global_options_are_accepted_before_and_after_the_command(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[OutputOptions] = []

    def record(name: str, as_json: bool, body: object) -> int:
        seen.append(output_options.get())
        return 0

    monkeypatch.setattr("raylava.cli.recipes.execute", record)
    assert main(words) == 0
    assert main(["recipes"]) == 0
    assert seen == [OutputOptions(quiet=True, log_level=logging.INFO), OutputOptions()]


def test_words_after_two_dashes_are_no_options(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--", "--quiet"]) == 2
    assert capfd.readouterr().err.startswith("error: --quiet: neither a file nor a shipped recipe")


def test_quiet_console_shows_errors_and_results() -> None:
    stream = io.StringIO()
    console = Console(stream, quiet=True)
    console.say("message")
    console.error("what went wrong")
    console.show("result")
    assert stream.getvalue() == "error: what went wrong\nresult\n"
