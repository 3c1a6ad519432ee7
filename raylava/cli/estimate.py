"""`raylava estimate`: predict memory, time and cost of a recipe or sweep before anything runs."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import DEFAULT_STORAGE, AsJson, Overrides, Storage
from raylava.console import Console
from raylava.errors import UserError

if TYPE_CHECKING:
    from raylava.config.recipe import Recipe
    from raylava.estimate.forecast import Forecast, KnownCorpora, Target
    from raylava.perf.hardware import Cluster
    from raylava.perf.step_time import DeviceSpeed

_INGEST_IMAGES = (558_128, 10_000_000, 1_000_000_000)
_MAX_GPUS_PER_NODE = 8
_DEFAULT_GPU = "h100"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text} is not a number") from error


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{text} is not above 0 and at most 1")
    return value


def _reclaim_rate(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1000:
        raise typer.BadParameter(f"{text} is not between 0 and 1,000")
    return value


Nodes = Annotated[
    int | None, typer.Option("--nodes", min=1, metavar="N", help="nodes (default: enough for the recipe's workers)")
]
GpusPerNode = Annotated[
    int | None, typer.Option("--gpus-per-node", min=1, metavar="G", help="GPUs per node (default: up to 8)")
]
Gpu = Annotated[
    str | None, typer.Option("--gpu", metavar="NAME", help="h100, a100, l40s, … (default: those of --prices, or h100)")
]
Mfu = Annotated[
    float | None,
    typer.Option("--mfu", parser=_fraction, metavar="FRACTION", help="fraction of peak FLOPs reached (default: 0.4)"),
]
Prices = Annotated[
    str | None,
    typer.Option(
        "--prices",
        metavar="FILE",
        help="YAML such as `h100x8: 60.0` or `cpux8: 0.4`, the price of a node per hour",
    ),
]
Corpora = Annotated[
    list[str] | None,
    typer.Option("--corpus", metavar="[NAME=]PATH", help="a prepared corpus: alignment or instruction"),
]
Rows = Annotated[
    list[str] | None, typer.Option("--rows", metavar="NAME=N", help="rows of a corpus that is not prepared")
]


@dataclass(frozen=True)
class EstimateOptions:
    """The options that determine where a recipe would run and what is known about its corpora."""

    storage: str
    nodes: int | None = None
    gpus_per_node: int | None = None
    gpu: str | None = None
    mfu: float | None = None
    prices: str | None = None
    corpus: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    calibrate: bool = False

    @property
    def names_cluster(self) -> bool:
        """Whether an option names the cluster."""
        return any((self.gpu, self.prices, self.nodes, self.gpus_per_node, self.mfu))


def command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="a recipe, or with --sweep a sweep: file or name")],
    overrides: Overrides = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="the file is a sweep; shared stages count once")] = False,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    gpu: Gpu = None,
    mfu: Mfu = None,
    prices: Prices = None,
    corpus: Corpora = None,
    rows: Rows = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="first time a few steps on this machine")] = False,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="simulate finetuning on 8 to 4,096 GPUs, with failures")
    ] = False,
    spot: Annotated[
        float | None,
        typer.Option(
            "--spot", parser=_reclaim_rate, metavar="RATE", help="with --simulate: spot reclaims per node and hour"
        ),
    ] = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> int:
    """Predict memory, time and cost of a recipe, before anything runs."""
    options = EstimateOptions(storage, nodes, gpus_per_node, gpu, mfu, prices, corpus or [], rows or [], calibrate)

    def body(console: Console) -> CommandResult:
        _validate_combination(options, sweep, simulate, spot)
        if sweep:
            return _estimate_sweep(recipe, overrides or [], options, console)
        return _estimate(recipe, overrides or [], options, simulate, spot, console)

    return execute("estimate", as_json, body)


def _validate_combination(options: EstimateOptions, sweep: bool, simulate: bool, spot: float | None) -> None:
    """Refuse options that would be ignored. Raises UserError."""
    conflicts = [
        ("sweep", sweep, "calibrate", options.calibrate),
        ("sweep", sweep, "simulate", simulate),
        ("calibrate", options.calibrate, "gpu", options.gpu),
        ("calibrate", options.calibrate, "prices", options.prices),
        ("calibrate", options.calibrate, "simulate", simulate),
    ]
    for first, first_given, second, second_given in conflicts:
        if first_given and second_given:
            raise UserError(f"--{first} cannot be combined with --{second}; leave one of them out")
    if spot is not None and not simulate:
        raise UserError("--spot applies to a simulated run only; add --simulate")


def _estimate(
    file: str, overrides: list[str], options: EstimateOptions, simulate: bool, spot: float | None, console: Console
) -> CommandResult:
    from raylava.config.load import load_recipe
    from raylava.estimate import tables
    from raylava.estimate.forecast import forecast

    recipe = load_recipe(file, overrides)
    known = _known_corpora(options, recipe)
    if options.calibrate:
        _calibrate(recipe, known, console)
    forecasts = [forecast(recipe, target, known) for target in _targets(options, recipe, known)]
    best_index = min(range(len(forecasts)), key=lambda index: _rank(forecasts[index]))
    best = forecasts[best_index]
    console.show(tables.sizes_table(best))
    for stage in best.stages:
        console.show(tables.candidates_table(stage))
    console.show(tables.ingest_table([*best.prepare.items(), *_ingest_at_scale(best.target)]))
    console.show(tables.totals_table(forecasts))
    data: dict[str, Any] = {
        "estimates": [tables.forecast_data(one_forecast) for one_forecast in forecasts],
        "best": best.target.label,
    }
    if simulate:
        cluster = _clusters(options, recipe)[best_index]
        data["simulated"] = _simulate(cluster, options, spot, recipe, known, console)
    return CommandResult(data)


def _rank(forecast: "Forecast") -> tuple[bool, float]:
    """Sort key: forecasts that fit first, then by cost, or by hours where no price is known."""
    return not forecast.fits, forecast.hours if forecast.cost is None else forecast.cost


def _known_corpora(options: EstimateOptions, recipe: "Recipe") -> "KnownCorpora":
    from raylava.estimate.forecast import KnownCorpora
    from raylava.estimate.workload import prepared_corpus
    from raylava.storage import storage_path

    corpora = {name: prepared_corpus(storage_path(path)) for name, path in _named(options.corpus, "--corpus")}
    rows = {name: _row_count(count, name) for name, count in _named(options.rows, "--rows")}
    return KnownCorpora(_corpora_in_storage(recipe, options.storage) | corpora, rows)


def _named(values: Sequence[str], option: str) -> list[tuple[Any, str]]:
    """Split NAME=VALUE options; a value without a name applies to the instruction corpus. Raises UserError."""
    pairs = [value.partition("=")[::2] if "=" in value else ("instruction", value) for value in values]
    for name, _ in pairs:
        if name not in ("alignment", "instruction"):
            raise UserError(f"{option} {name}=…: a recipe's corpora are alignment and instruction")
    return list(pairs)


def _row_count(text: str, name: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--rows {name}={text}: give a number above 0")
    return int(text)


def _corpora_in_storage(recipe: "Recipe", storage: str) -> dict[Any, Any]:
    """Return the recipe's prepared corpora in storage, where its files are available to identify them."""
    from raylava.estimate.workload import prepared_corpus
    from raylava.pipeline.graph import build_stages
    from raylava.storage import storage_path

    root = storage_path(storage)
    if not (root / "prepare").exists():
        return {}
    try:
        stages = [stage for stage in build_stages(recipe, root) if stage.kind == "prepare"]
    except UserError:  # backbones or annotations are not available, so that no artifact can be identified
        return {}
    existing = [stage for stage in stages if stage.spec().find() is not None]
    return {stage.label.removeprefix("prepare "): prepared_corpus(stage.spec().path) for stage in existing}


def _targets(options: EstimateOptions, recipe: "Recipe", known: "KnownCorpora") -> list["Target"]:
    """Return where the recipe would run.

    That is the cluster named by options, each cluster of the price table, or this machine for a recipe that trains on
    CPUs or was just calibrated.
    """
    from raylava.estimate.forecast import gpu_target
    from raylava.estimate.local_machine import local_target

    if options.calibrate or not (options.names_cluster or recipe.resources.gpus_per_worker):
        return [local_target(recipe, known)]
    return [gpu_target(cluster, _device_speed(cluster, options.mfu)) for cluster in _clusters(options, recipe)]


def _clusters(options: EstimateOptions, recipe: "Recipe") -> list["Cluster"]:
    from raylava.perf.hardware import make_cluster, read_prices

    workers = recipe.resources.workers
    prices = read_prices(options.prices) if options.prices else {}
    if options.gpu is None and prices:
        keys = (key.rpartition("x") for key in prices)
        node_types = [(name, int(gpus)) for name, _, gpus in keys if name != "cpu"]
        node_types = [node_type for node_type in node_types if options.gpus_per_node in (None, node_type[1])]
        if not node_types:
            count = options.gpus_per_node or "any"
            raise UserError(f"--prices {options.prices}: no node with {count} GPUs is listed")
    else:
        gpus_per_node = options.gpus_per_node or min(_MAX_GPUS_PER_NODE, workers)
        node_types = [(options.gpu or _DEFAULT_GPU, gpus_per_node)]
    return [make_cluster(options.nodes or -(-workers // gpus), gpus, name, prices) for name, gpus in node_types]


def _device_speed(cluster: "Cluster", mfu: float | None) -> "DeviceSpeed":
    from raylava.perf.step_time import STATED_MFU, nominal_speed

    return nominal_speed(cluster.device, mfu or STATED_MFU)


def _calibrate(recipe: "Recipe", known: "KnownCorpora", console: Console) -> None:
    from raylava.estimate.calibrate import calibrate
    from raylava.estimate.local_machine import workloads

    for stage, workload in workloads(recipe, known).items():
        console.say(f"timing a few steps of {stage} on this machine…")
        with tempfile.TemporaryDirectory(prefix="raylava-calibrate-") as folder:
            speed = calibrate(recipe, stage, workload, Path(folder)).speed
        console.say(f"[green]✓[/] {stage}: {speed.flops_per_s / 1e9:,.1f} GFLOP/s per worker, {speed.source}")


def _ingest_at_scale(target: "Target") -> list[tuple[str, Any]]:
    """Plan preparing 558 thousand, 10 million and a billion images on as few nodes as finish within a day."""
    from raylava.estimate.ingest import IngestSpec, plan_ingest

    files = [
        (f"{images:,} files in S3", plan_ingest(IngestSpec(images, target.cpu_cores))) for images in _INGEST_IMAGES
    ]
    tars = IngestSpec(_INGEST_IMAGES[-1], target.cpu_cores, images_per_shard=1000, prefixes=16)
    return [*files, (f"{_INGEST_IMAGES[-1]:,} in tars in S3", plan_ingest(tars))]


def _simulate(
    cluster: "Cluster",
    options: EstimateOptions,
    spot: float | None,
    recipe: "Recipe",
    known: "KnownCorpora",
    console: Console,
) -> dict[str, Any]:
    from raylava.estimate.scaling import scaling_data, scaling_table, simulate_scaling
    from raylava.estimate.simulate import FailureModel

    failures = FailureModel(reclaims_per_node_hour=spot or 0.0, elastic=recipe.resources.min_workers is not None)
    report = simulate_scaling(recipe, cluster, _device_speed(cluster, options.mfu), known, failures)
    console.show(scaling_table(recipe.name, report))
    return scaling_data(report)


def _estimate_sweep(file: str, overrides: list[str], options: EstimateOptions, console: Console) -> CommandResult:
    from raylava.storage import storage_path
    from raylava.tune.runner import SweepRun
    from raylava.tune.sweep import load_sweep

    sweep = load_sweep(file)
    variants = SweepRun(sweep, overrides, storage_path(options.storage)).planned_variants()
    return CommandResult(show_sweep_cost(sweep.name, [variant.recipe for variant in variants], options, console))


def show_sweep_cost(
    name: str, recipes: "Sequence[Recipe]", options: EstimateOptions, console: Console
) -> dict[str, Any]:
    """Display the predicted cost of all variants, shared stages counted once. Raises UserError like a forecast."""
    from raylava.estimate.sweep_cost import shared_stages, shared_stages_table

    stages = shared_stages(
        recipes,
        lambda recipe, known: _targets(options, recipe, known)[0],
        lambda recipe: _known_corpora(options, recipe),
    )
    console.show(shared_stages_table(name, len(recipes), stages))
    worker_hours = sum(stage.worker_hours for stage in stages)
    return {"trials": len(recipes), "stages": [asdict(stage) for stage in stages], "worker_hours": worker_hours}
