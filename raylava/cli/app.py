"""The typer application: registers the commands and runs a command line."""

import argparse
import contextvars
import itertools
import logging
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import typer
from typer.exceptions import TyperException

import raylava
from raylava.cli import (
    batches,
    chat,
    check,
    compare,
    demo,
    estimate,
    evaluate,
    inspect,
    local_cluster,
    preemption_watcher,
    recipes,
    replay,
    report,
    run,
    score,
    show,
    status,
    stop,
    submit,
    sweep,
    toy,
    train,
    verify,
)
from raylava.cli.command import OutputOptions, output_options
from raylava.cli.options import help_text
from raylava.errors import UserError


class _Entry(NamedTuple):
    """A command in `raylava --help`: its function, and lines that show how it is used."""

    command: Callable[..., int]
    examples: tuple[str, ...]


# By panel of `raylava --help`, in the order in which it lists them.
_COMMANDS: dict[str, dict[str, _Entry]] = {
    "Start here": {
        "demo": _Entry(demo.command, ("raylava demo",)),
        "recipes": _Entry(recipes.list_recipes, ("raylava recipes", "raylava recipes copy toy mine.yaml")),
        "check": _Entry(
            check.command,
            ("raylava check mine.yaml", "raylava check llava-gemma-2b --cluster cluster/aws.yaml"),
        ),
        "estimate": _Entry(
            estimate.command, ("raylava estimate llava-gemma-7b --nodes 1 --gpus-per-node 8 --gpu h100",)
        ),
        "toy": _Entry(toy.command, ("raylava toy toy",)),
    },
    "Train and evaluate": {
        "run": _Entry(run.command, ("raylava run toy finetune.lr=1e-4", "raylava run mine.yaml --only prepare")),
        "train": _Entry(
            train.command,
            (
                "raylava train toy finetune",
                "torchrun --no-python --nproc-per-node 2 raylava train toy finetune",
            ),
        ),
        "evaluate": _Entry(
            evaluate.command,
            (
                "raylava evaluate MODEL --benchmark pope --data DIR",
                "raylava evaluate MODEL --benchmark pope --data DIR --endpoint URL",
            ),
        ),
        "score": _Entry(score.command, ("raylava score gqa --data DIR --answers answers.jsonl",)),
        "compare": _Entry(compare.command, ("raylava compare EVALUATION EVALUATION --html compare.html",)),
        "chat": _Entry(chat.command, ('raylava chat MODEL "What do you see?" --image photo.jpg',)),
    },
    "Sweeps": {
        "sweep": _Entry(sweep.command, ("raylava sweep toy-ablations --plan", "raylava sweep toy-ablations")),
    },
    "Inspect results": {
        "status": _Entry(status.command, ("raylava status", "raylava status toy --storage s3://BUCKET/raylava")),
        "report": _Entry(report.command, ("raylava report toy", "raylava report toy-ablations --output ablation.html")),
        "inspect": _Entry(
            inspect.command, ("raylava inspect raylava-storage/prepare/ID", "raylava inspect mine.yaml --source")
        ),
        "show": _Entry(show.command, ("raylava show raylava-storage/finetune/ID",)),
        "verify": _Entry(verify.command, ("raylava verify raylava-storage/finetune/ID",)),
        "batches": _Entry(batches.command, ("raylava batches raylava-storage/finetune/ID",)),
        "replay": _Entry(replay.command, ("raylava replay FOLDER",)),
    },
    "Clusters and jobs": {
        "submit": _Entry(submit.command, ("raylava submit mine.yaml --storage s3://BUCKET/raylava",)),
        "stop": _Entry(stop.command, ("raylava stop mine.yaml --storage s3://BUCKET/raylava",)),
        "local-cluster": _Entry(
            local_cluster.command, ('eval "$(raylava local-cluster up)"', 'eval "$(raylava local-cluster down)"')
        ),
        "preemption-watcher": _Entry(
            preemption_watcher.command, ("raylava preemption-watcher --address 10.0.0.2:6379",)
        ),
    },
}
_LIBRARIES = ("ray", "torch", "transformers", "deepspeed")

app = typer.Typer(
    name="raylava",
    help=help_text(
        """Train, evaluate and ablate LLaVA-Gemma on Ray.

        RECIPE is a YAML file, or a name that `raylava recipes` lists. key=value changes a setting of it.
        """,
        "raylava demo",
    ),
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
)
for panel, entries in _COMMANDS.items():
    for name, entry in entries.items():
        text = help_text(entry.command.__doc__ or "", *entry.examples)
        if name == "recipes":
            app.add_typer(recipes.group, name=name, help=text, rich_help_panel=panel)
        else:
            app.command(name, help=text, rich_help_panel=panel)(entry.command)


def _print_version(is_given: bool) -> None:
    """Print the versions of raylava and the libraries that it builds on, from their metadata, and end."""
    if not is_given:
        return
    from importlib.metadata import PackageNotFoundError, version

    lines = [f"raylava {raylava.__version__}", f"Python {platform.python_version()}"]
    for library in _LIBRARIES:
        try:
            lines.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            lines.append(f"{library} is not installed")
    sys.stdout.write("\n".join(lines) + "\n")
    raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print versions and exit"),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print errors and the result only")] = False,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option("--log-level", metavar="LEVEL", help="raylava's log: debug, info, warning or error"),
    ] = "warning",
) -> None:
    output_options.set(OutputOptions(quiet, logging.getLevelNamesMapping()[log_level.upper()]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status. A mistake in the command line is reported in one line."""
    arguments = _global_options_first(list(sys.argv[1:] if argv is None else argv))
    command = typer.main.get_command(app)
    try:
        # In a context of its own, since the global options are context variables.
        exit_status = contextvars.copy_context().run(
            command.main, arguments, prog_name="raylava", standalone_mode=False
        )
    except TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "raylava"
        sys.stderr.write(f"error: {' '.join(error.format_message().split())}; see `{path} --help`\n")
        return 2
    return exit_status or 0


def _global_options_first(arguments: list[str]) -> list[str]:
    """Move --quiet and --log-level to the front, where the parser expects them: they may follow the command."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    first: list[str] = []
    rest: list[str] = []
    words = iter(arguments[:end])
    for word in words:
        if word == "--log-level":
            first += [word, *itertools.islice(words, 1)]
        elif word == "--quiet" or word.startswith("--log-level="):
            first.append(word)
        else:
            rest.append(word)
    if first[-1:] == ["--log-level"]:
        return first  # the parser reports that its value is missing
    return [*first, *rest, *arguments[end:]]


def run_job(command: str, subject: str, *fixed: str) -> int:
    """Run a command as jobs/ do, with its subject given as an option (`--recipe FILE`); return its exit status."""
    from raylava.cluster.jobs import validate_shared_storage

    parser = argparse.ArgumentParser(description=f"raylava {command}, as a cluster job", add_help=False)
    parser.add_argument(subject, dest="subject", required=True)
    parser.add_argument("--storage", required=True)
    options, rest = parser.parse_known_args()
    try:
        validate_shared_storage(options.storage)
    except UserError as error:
        parser.error(str(error))
    return main([command, options.subject, *fixed, "--storage", options.storage, *rest])
