"""`raylava stop`: stop the cluster job of a recipe or sweep."""

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import DEFAULT_STORAGE, Address, AsJson, Overrides, RecipeFile, Storage, job_server


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    address: Address = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> int:
    """Stop the cluster job of a recipe or sweep; it can be resumed later."""
    return execute("stop", as_json, lambda console: _stop(recipe, overrides or [], address, storage))


def _stop(file: str, overrides: list[str], address: str | None, storage: str) -> CommandResult:
    from raylava.cli.job_specs import job_spec_for
    from raylava.cluster.jobs import JobClient

    job = job_spec_for(file, overrides, storage)
    stopped = JobClient(job_server(address)).stop(job)
    text = (
        f"{stopped}: stopped; submit again to resume from the last checkpoint" if stopped else "no such job is running"
    )
    return CommandResult({"submission_id": stopped}, text)
