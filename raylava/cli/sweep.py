"""`raylava sweep`: run every variant of a sweep, building shared stages once."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.estimate import (
    Corpora,
    EstimateOptions,
    Gpu,
    GpusPerNode,
    Mfu,
    Nodes,
    Prices,
    Rows,
    show_sweep_cost,
)
from raylava.cli.options import DEFAULT_STORAGE, AsJson, Overrides, Storage
from raylava.console import Console, escape
from raylava.errors import RunError, UserError

if TYPE_CHECKING:
    from raylava.config.recipe import Recipe


def command(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="a sweep file, or a name that `raylava recipes` lists")],
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="show the plan and its hours, and run nothing")] = False,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    gpu: Gpu = None,
    mfu: Mfu = None,
    prices: Prices = None,
    corpus: Corpora = None,
    rows: Rows = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> int:
    """Run every variant of a sweep, building shared stages once."""
    options = EstimateOptions(storage, nodes, gpus_per_node, gpu, mfu, prices, corpus or [], rows or [])
    return execute("sweep", as_json, lambda console: _sweep(sweep, overrides or [], plan, options, console))


def _sweep(
    file: str, overrides: list[str], plan_only: bool, options: EstimateOptions, console: Console
) -> CommandResult:
    from raylava.api import sweeps
    from raylava.perf.hardware import read_prices
    from raylava.tune.tables import results_table

    if options.prices:
        read_prices(options.prices)  # a mistake in it must not be found after the trials
    if plan_only:
        return _show_plan(file, overrides, options, console)
    sweep = sweeps.sweep(
        file,
        overrides,
        storage=options.storage,
        device_hour_price=lambda recipe: _device_hour_price(options, recipe),
        console=console,
    )
    console.show(results_table(sweep.results))
    report = escape(str(sweep.folder / "report.html"))
    console.show(f"report: [bold]{report}[/]   (report.md and results.csv are beside it)")
    if sweep.failed:
        raise RunError(
            f"{len(sweep.failed)} of {len(sweep.trials)} trials failed, the first: {sweep.failed[0].failure}"
        )
    return CommandResult({"results": sweep.table(), "folder": sweep.folder.uri})


def _show_plan(file: str, overrides: list[str], options: EstimateOptions, console: Console) -> CommandResult:
    """Display the stages of a sweep and its predicted hours, without running it."""
    from raylava.api.sweeps import prepare_sweep
    from raylava.storage import writable
    from raylava.tune.sweep import load_sweep
    from raylava.tune.tables import plan_table

    sweep = load_sweep(file)  # a mistake in it is reported before the storage is touched
    _, plan = prepare_sweep(sweep, overrides, writable(options.storage))
    console.show(plan_table(plan))
    hours = _show_hours(sweep.name, [variant.recipe for variant in plan.variants], options, console)
    return CommandResult({"stages": [vars(stage) for stage in plan.planned_stages], "hours": hours})


def _device_hour_price(options: EstimateOptions, recipe: "Recipe") -> float | None:
    """Return the price of a GPU, or of a CPU core, for an hour; None without a price table."""
    from raylava.perf.hardware import device_hour_price, read_prices

    if options.prices is None:
        return None
    uses_gpus = recipe.resources.gpus_per_worker > 0
    return device_hour_price(read_prices(options.prices), uses_gpus, options.gpu, options.gpus_per_node)


def _show_hours(name: str, recipes: "list[Recipe]", options: EstimateOptions, console: Console) -> dict[str, Any]:
    """Display the hours of the plan, where enough is known about its corpora to predict them."""
    try:
        return show_sweep_cost(name, recipes, options, console)
    except UserError as error:
        console.say(f"[dim]no prediction of its duration: {escape(str(error))}[/]")
        return {}
