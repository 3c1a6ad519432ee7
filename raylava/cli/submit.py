"""`raylava submit`: run a recipe or sweep as a cluster job and follow it."""

import io
from typing import Annotated

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import DEFAULT_STORAGE, Address, AsJson, Overrides, RecipeFile, Storage, job_server
from raylava.console import Console


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    detach: Annotated[bool, typer.Option("--detach", help="do not follow the job")] = False,
    address: Address = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> int:
    """Run a recipe or sweep as a cluster job, and follow it."""
    return execute(
        "submit", as_json, lambda console: _submit(recipe, overrides or [], detach, address, storage, console)
    )


def _submit(
    file: str, overrides: list[str], detach: bool, address: str | None, storage: str, console: Console
) -> CommandResult:
    from raylava.cli.job_specs import job_spec_for
    from raylava.cluster.jobs import JobClient

    job = job_spec_for(file, overrides, storage)
    client = JobClient(job_server(address))
    submission_id, is_new = client.submit(job)
    console.say(f"job [bold]{submission_id}[/] " + ("submitted" if is_new else "is already running; following it"))
    if not detach:
        try:
            client.follow(submission_id, io.StringIO() if console.quiet else console.stream)
        except KeyboardInterrupt:
            console.say(f"{submission_id} keeps running: submit again to follow it, `raylava stop` to stop it")
            raise
    next_command = f"next:  raylava status --storage {storage}"
    return CommandResult({"submission_id": submission_id, "new": is_new}, next_command)
