"""`raylava report`: write a run's report, or a sweep's, as one HTML page."""

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import DEFAULT_STORAGE, AsJson, Overrides, Storage
from raylava.console import Console, escape
from raylava.errors import UserError

if TYPE_CHECKING:
    from raylava.pipeline.run_report.data import ReportSubject
    from raylava.storage import StoragePath


def command(
    subject: Annotated[str, typer.Argument(metavar="RUN|SWEEP", help="a recipe, an artifact's folder, or a sweep")],
    overrides: Overrides = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE", help="the page to write (default: in STORAGE/reports)")
    ] = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> int:
    """Write the report of a run or a sweep as one HTML page: stages, scores, curves, answers."""
    return execute("report", as_json, lambda console: _report(subject, overrides or [], output, storage, console))


def _report(subject: str, overrides: list[str], output: str | None, storage: str, console: Console) -> CommandResult:
    from raylava.pipeline.run_report.page import write_report
    from raylava.storage import storage_path, writable

    path = storage_path(subject)
    if path.is_folder():
        if overrides:
            raise UserError(f"{overrides[0]}: a folder has no settings to change; overrides go with a recipe")
        if (path / "report.md").exists():  # of a sweep, which wrote its report at its end
            return _written_sweep_report(path)
        page, data = write_report(_artifact_subject(subject), output)
    elif "axes" in (settings := _read(subject)) or "recipe" in settings:
        if output is not None:
            raise UserError(f"--output {output}: a sweep's report is written into STORAGE/sweeps; omit the option")
        return _report_sweep(subject, overrides, writable(storage), console)
    else:
        page, data = write_report(_recipe_subject(subject, overrides, writable(storage)), output)
    console.say(f"report: [bold]{escape(page)}[/]")
    return CommandResult(data)


def _read(file: str) -> dict[str, Any]:
    from raylava.config.load import read_recipe

    return read_recipe(file)


def _artifact_subject(folder: str) -> "ReportSubject":
    """Describe the run that an artifact belongs to."""
    from raylava.artifacts import load_artifact
    from raylava.pipeline.run_report.data import ReportSubject
    from raylava.pipeline.run_report.stages import stages_of_artifact
    from raylava.storage import StoragePath

    artifact = load_artifact(folder)
    path = artifact.path
    root = StoragePath(path.filesystem, path.path.rsplit("/", 2)[0], path.uri.rsplit("/", 2)[0])
    name = f"{artifact.stage}-{artifact.fingerprint}"
    return ReportSubject(name, stages_of_artifact(artifact), root, shlex.join(["raylava", "show", folder]))


def _recipe_subject(recipe_file: str, overrides: list[str], storage: "StoragePath") -> "ReportSubject":
    """Describe the run of a recipe, whether it is finished or not. Raises UserError if no stage has begun."""
    from raylava.config.load import load_recipe
    from raylava.pipeline.graph import build_stages
    from raylava.pipeline.run_report.data import ReportSubject
    from raylava.pipeline.run_report.stages import stages_of_recipe

    recipe = load_recipe(recipe_file, overrides)
    stages = stages_of_recipe(build_stages(recipe, storage))
    if not any(stage.path.exists() for stage in stages):
        raise UserError(f"{recipe_file}: no stage of it is in {storage}; build them with `raylava run`")
    command = shlex.join(["raylava", "run", recipe_file, *overrides, "--storage", str(storage)])
    return ReportSubject(recipe.name, stages, storage, command, recipe)


def _written_sweep_report(folder: "StoragePath") -> CommandResult:
    page = folder / "report.html"
    return CommandResult({"report": str(page)}, f"report: {page}   (the sweep's file writes it again)")


def _report_sweep(file: str, overrides: list[str], storage: "StoragePath", console: Console) -> CommandResult:
    """Write the report of a sweep from what is in storage; a variant that is not finished counts as failed."""
    from raylava.tune.report import write_report
    from raylava.tune.results import SweepResults
    from raylava.tune.runner import SweepRun
    from raylava.tune.sweep import load_sweep
    from raylava.tune.sweep_plan import plan_of_results
    from raylava.tune.tables import results_table

    run = SweepRun(load_sweep(file), overrides, storage)
    trials = run.recorded_results()
    if not trials:
        raise UserError(f"{file}: no trial of it is in {storage}; run it with `raylava sweep`")
    results = SweepResults(run.sweep, overrides, plan_of_results(trials, storage, run.inputs), trials)
    write_report(results, run.folder)
    console.show(results_table(results))
    console.say(f"report: [bold]{escape(str(run.folder / 'report.html'))}[/]")
    return CommandResult({"results": results.table(), "folder": run.folder.uri})
