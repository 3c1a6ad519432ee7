"""The typer application: registers the commands and runs a command line."""

import argparse
import sys
from collections.abc import Sequence

import typer
from typer.exceptions import TyperException

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
from raylava.errors import UserError

_COMMANDS = {
    "demo": demo,
    "run": run,
    "train": train,
    "sweep": sweep,
    "toy": toy,
    "check": check,
    "estimate": estimate,
    "evaluate": evaluate,
    "score": score,
    "compare": compare,
    "chat": chat,
    "inspect": inspect,
    "show": show,
    "verify": verify,
    "status": status,
    "report": report,
    "batches": batches,
    "replay": replay,
    "submit": submit,
    "stop": stop,
    "local-cluster": local_cluster,
    "preemption-watcher": preemption_watcher,
}

app = typer.Typer(
    name="raylava",
    help="Train, evaluate and ablate LLaVA-Gemma on Ray.",
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
)
for name, module in _COMMANDS.items():
    app.command(name)(module.command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status. A mistake in the command line is reported in one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        exit_status = typer.main.get_command(app).main(arguments, prog_name="raylava", standalone_mode=False)
    except TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "raylava"
        sys.stderr.write(f"error: {' '.join(error.format_message().split())}; see `{path} --help`\n")
        return 2
    return exit_status or 0


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
