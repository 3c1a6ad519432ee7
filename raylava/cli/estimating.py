"""The command that says what a recipe will cost: estimate."""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylava.cli.command import Add, Outcome, positive, takes_overrides
from raylava.console import Console
from raylava.errors import UserError

if TYPE_CHECKING:
    from raylava.config.recipe import Recipe
    from raylava.estimate.forecast import Forecast, KnownCorpora, Target
    from raylava.perf.hardware import Cluster

_SCALES = (558_128, 10_000_000, 1_000_000_000)


def register(add: Add) -> None:
    """Add this command."""
    estimate = add("estimate", _estimate, "memory, time and money of a recipe, before anything runs")
    estimate.add_argument("recipe", metavar="RECIPE.yaml", help="a recipe, or with --sweep a sweep")
    estimate.add_argument("--sweep", action="store_true", help="the file is a sweep: what variants share counts once")
    takes_cluster(estimate)
    takes_corpora(estimate)
    estimate.add_argument("--calibrate", action="store_true", help="time a few steps on this machine first")
    estimate.add_argument("--simulate", action="store_true", help="play finetuning on 8 to 4,096 GPUs, with failures")
    estimate.add_argument("--spot", type=_rate, metavar="RATE", help="with it: spot reclaims, a node and hour (0)")
    takes_overrides(estimate)


def takes_cluster(parser: argparse._ActionsContainer) -> None:
    """TrialStatus it would run, and at what price."""
    parser.add_argument("--nodes", type=positive, metavar="N", help="nodes (as many as the recipe's workers need)")
    parser.add_argument("--gpus-per-node", type=positive, metavar="G", help="GPUs of each (up to 8)")
    parser.add_argument("--gpu", metavar="NAME", help="h100, a100, l40s, …; without it those of --prices, or h100")
    parser.add_argument("--mfu", type=_share, metavar="SHARE", help="of the GPU's peak that is reached (0.4)")
    parser.add_argument("--prices", metavar="FILE", help="YAML, such as `h100x8: 60.0`: a node's price for an hour")


def takes_corpora(parser: argparse._ActionsContainer) -> None:
    """What is known of the corpora."""
    parser.add_argument(
        "--corpus", action="append", default=[], metavar="[NAME=]PATH", help="a prepared one: alignment or instruction"
    )
    parser.add_argument("--rows", action="append", default=[], metavar="NAME=N", help="rows of one that is not")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from error
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from error
    if not 0 <= value < 1000:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1,000")
    return value


def _check(arguments: argparse.Namespace) -> None:
    """Options that would be ignored are mistakes."""
    clashes = [
        ("sweep", "calibrate"),
        ("sweep", "simulate"),
        ("calibrate", "gpu"),
        ("calibrate", "prices"),
        ("calibrate", "simulate"),
    ]
    for one, other in clashes:
        if getattr(arguments, one) and getattr(arguments, other):
            raise UserError(f"--{one} goes without --{other}; leave one of them out")
    if arguments.spot is not None and not arguments.simulate:
        raise UserError("--spot says how a simulated run loses nodes; add --simulate")


def _estimate(arguments: argparse.Namespace, console: Console) -> Outcome:
    _check(arguments)
    if arguments.sweep:
        return _sweep(arguments, console)
    from raylava.config.load import load_recipe
    from raylava.estimate import tables
    from raylava.estimate.forecast import forecast

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    given = _given(arguments, recipe)
    if arguments.calibrate:
        _calibrate(recipe, given, console)
    found = [forecast(recipe, target, given) for target in _targets(arguments, recipe, given)]
    place = min(range(len(found)), key=lambda one: _merit(found[one]))
    best = found[place]
    console.show(tables.sizes_table(best))
    for stage in best.stages:
        console.show(tables.ways_table(stage))
    console.show(tables.ingest_table([*best.prepare.items(), *_at_scale(best.target)]))
    console.show(tables.totals_table(found))
    data: dict[str, Any] = {"estimates": [tables.data(one) for one in found], "fastest_feasible": best.target.label}
    if arguments.simulate:
        data["simulated"] = _simulate(_clusters(arguments, recipe)[place], arguments, recipe, given, console)
    return Outcome(data)


def _merit(one: "Forecast") -> tuple[bool, float]:
    return not one.fits, one.hours if one.cost is None else one.cost


def _given(arguments: argparse.Namespace, recipe: "Recipe") -> "KnownCorpora":
    from raylava.estimate.forecast import KnownCorpora
    from raylava.estimate.workload import prepared
    from raylava.storage import storage_path

    corpora = {name: prepared(storage_path(path)) for name, path in _named(arguments.corpus, "--corpus")}
    rows = {name: _count(count, name) for name, count in _named(arguments.rows, "--rows")}
    return KnownCorpora(_found(recipe, arguments.storage) | corpora, rows)


def _named(given: Sequence[str], option: str) -> list[tuple[Any, str]]:
    pairs = [one.partition("=")[::2] if "=" in one else ("instruction", one) for one in given]
    for name, _ in pairs:
        if name not in ("alignment", "instruction"):
            raise UserError(f"{option} {name}=…: a recipe's corpora are alignment and instruction")
    return list(pairs)


def _count(text: str, name: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--rows {name}={text}: give a number above 0")
    return int(text)


def _found(recipe: "Recipe", storage: str) -> dict[Any, Any]:
    """Corpora of the recipe that storage holds, where its files are at hand to know them by."""
    from raylava.estimate.workload import prepared
    from raylava.pipeline.stages import stages_of
    from raylava.storage import storage_path

    where = storage_path(storage)
    if not (where / "prepare").exists():
        return {}
    try:
        stages = [stage for stage in stages_of(recipe, where) if stage.spec.stage == "prepare"]
    except UserError:  # backbones or annotations are not at hand: nothing of this recipe can be recognised
        return {}
    made = [stage for stage in stages if stage.spec.find() is not None]
    return {stage.label.removeprefix("prepare "): prepared(stage.spec.path) for stage in made}


def _targets(arguments: argparse.Namespace, recipe: "Recipe", given: "KnownCorpora") -> list["Target"]:
    """The cluster that options name; every one of the price table; this machine, for a recipe that trains on CPUs or
    was just timed here.
    """
    from raylava.estimate.forecast import on_gpus
    from raylava.estimate.local_machine import on_this_machine

    named = any(getattr(arguments, name) for name in ("gpu", "prices", "nodes", "gpus_per_node", "mfu"))
    if getattr(arguments, "calibrate", False) or not (named or recipe.resources.gpus_per_worker):
        return [on_this_machine(recipe, given)]
    clusters = _clusters(arguments, recipe)
    return [on_gpus(one, _speed(one, arguments.mfu)) for one in clusters]


def _clusters(arguments: argparse.Namespace, recipe: "Recipe") -> list["Cluster"]:
    from raylava.perf.hardware import cluster, read_prices

    prices = read_prices(arguments.prices) if arguments.prices else {}
    if arguments.gpu is None and prices:
        kinds = [(name, int(gpus)) for name, _, gpus in (key.rpartition("x") for key in prices)]
        kinds = [one for one in kinds if arguments.gpus_per_node in (None, one[1])]
        if not kinds:
            raise UserError(f"--prices {arguments.prices}: names no node of {arguments.gpus_per_node} GPUs")
    else:
        kinds = [(arguments.gpu or "h100", arguments.gpus_per_node or min(8, recipe.resources.workers))]
    return [
        cluster(arguments.nodes or -(-recipe.resources.workers // gpus), gpus, name, prices) for name, gpus in kinds
    ]


def _speed(cluster: "Cluster", mfu: float | None) -> Any:
    from raylava.perf.step_time import STATED_MFU, nominal_speed

    return nominal_speed(cluster.device, mfu or STATED_MFU)


def _calibrate(recipe: "Recipe", given: "KnownCorpora", console: Console) -> None:
    from raylava.estimate.calibrate import calibrate
    from raylava.estimate.local_machine import workloads

    for stage, workload in workloads(recipe, given).items():
        console.say(f"timing some steps of {stage} on this machine…")
        with tempfile.TemporaryDirectory(prefix="raylava-calibrate-") as folder:
            found = calibrate(recipe, stage, workload, Path(folder))
        console.say(f"[green]✓[/] {stage}: {found.speed.flops / 1e9:,.1f} GFLOP/s a worker, {found.speed.source}")


def _at_scale(target: "Target") -> list[tuple[str, Any]]:
    """558 k, 10 M and a billion images, on as few nodes as a day matches_filters."""
    from raylava.estimate.ingest import Ingest, plan

    single = [(f"{images:,} files in S3", plan(Ingest(images, target.cores))) for images in _SCALES]
    packed = Ingest(_SCALES[-1], target.cores, shard=1000, prefixes=16)
    return [*single, (f"{_SCALES[-1]:,} in tars in S3", plan(packed))]


def _simulate(
    cluster: "Cluster", arguments: argparse.Namespace, recipe: "Recipe", given: "KnownCorpora", console: Console
) -> dict[str, Any]:
    from raylava.estimate.scaling import data, scale_table, simulate_scaling
    from raylava.estimate.simulate import FailureModel

    world = FailureModel(reclaims_per_node_hour=arguments.spot or 0.0, elastic=recipe.resources.min_workers is not None)
    found = simulate_scaling(recipe, cluster, _speed(cluster, arguments.mfu), given, world)
    console.show(scale_table(recipe.name, found))
    return data(found)


def _sweep(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.storage import storage_path
    from raylava.tune.runner import SweepRun
    from raylava.tune.sweep import load_sweep

    sweep = load_sweep(arguments.recipe)
    expected = SweepRun(sweep, arguments.overrides, storage_path(arguments.storage)).expected()
    return Outcome(sweep_hours(sweep.name, [one.recipe for one in expected], arguments, console))


def sweep_hours(
    name: str, recipes: "Sequence[Recipe]", arguments: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Show what the variants come to, what they share counted once. Raises UserError as a forecast does."""
    from raylava.estimate.sweep_cost import shared_stages, shared_stages_table

    found = shared_stages(
        recipes,
        lambda recipe, given: _targets(arguments, recipe, given)[0],
        lambda recipe: _given(arguments, recipe),
    )
    console.show(shared_stages_table(name, len(recipes), found))
    hours = sum(one.worker_hours for one in found)
    return {"trials": len(recipes), "pieces": [asdict(one) for one in found], "worker_hours": hours}
