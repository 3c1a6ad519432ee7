"""Predicts a recipe's finetuning from one node to thousands of GPUs, with simulated node failures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from raylava.config.recipe import Recipe
from raylava.errors import UserError
from raylava.estimate.forecast import KnownCorpora, StageForecast, forecast, gpu_target
from raylava.estimate.simulate import (
    FailureModel,
    ScaledRun,
    TrainingRun,
    best_interval,
    daly_interval,
    mean_goodput,
    mean_time_between_failures,
    scale_run,
    worthwhile_size,
    young_interval,
)
from raylava.perf.hardware import Cluster
from raylava.perf.step_time import DeviceSpeed

_MAX_GPUS = 4096
_UPLOAD_RATE = 1e9  # bytes/s of a node, to an object store


@dataclass(frozen=True)
class ScalingReport:
    """The finetuning stage simulated at several sizes.

    `run` is the run at the requested size, `best_interval_s` its best time between checkpoints in seconds and `goodput`
    its mean goodput with that interval, beside the intervals by Young's and Daly's formulas.
    """

    failures: FailureModel
    scaled: list[ScaledRun]
    worthwhile_size: int
    run: TrainingRun
    best_interval_s: float
    young_interval_s: float
    daly_interval_s: float
    goodput: float


def simulate_scaling(
    recipe: Recipe,
    cluster: Cluster,
    speed: DeviceSpeed,
    known: KnownCorpora,
    failures: FailureModel,
    nodes: Sequence[int] = (),
) -> ScalingReport:
    """Simulate the recipe's finetuning on the cluster's number of nodes, and on each number of nodes in `nodes`.

    `nodes` defaults to the powers of two up to 4,096 GPUs. Raises UserError if finetuning does not fit the cluster.
    """

    def finetune_on(count: int) -> StageForecast:
        target = gpu_target(replace(cluster, nodes=count), speed)
        return forecast(recipe, target, known, compare_all=False).stages[-1]

    requested = finetune_on(cluster.nodes)
    if requested.planned.infeasible:
        raise UserError(
            f"finetune does not fit {requested.target.label}: {requested.planned.infeasible}; "
            "choose one of the configurations in the table above that fit"
        )
    stages = {count * cluster.gpus: finetune_on(count) for count in nodes or _powers_of_two(_MAX_GPUS // cluster.gpus)}
    feasible = [workers for workers, stage in stages.items() if not stage.planned.infeasible]
    scaled = scale_run(
        feasible, lambda workers: (_training_run(stages[workers]), asdict(stages[workers].planned.seconds)), failures
    )
    run = _training_run(requested)
    best, mtbf_s = best_interval(run, failures), mean_time_between_failures(run, failures)
    checkpoint_s = run.checkpoint_stall_s + run.upload_s  # a checkpoint is safe only after its upload
    return ScalingReport(
        failures,
        scaled,
        worthwhile_size(scaled),
        run,
        best,
        young_interval(checkpoint_s, mtbf_s),
        daly_interval(checkpoint_s, mtbf_s),
        mean_goodput(replace(run, checkpoint_interval_s=best), failures),
    )


def _powers_of_two(limit: int) -> list[int]:
    return [2**power for power in range(max(1, limit).bit_length()) if 2**power <= max(1, limit)]


def _training_run(stage: StageForecast) -> TrainingRun:
    workers, nodes = stage.target.budget.world_size, stage.target.nodes
    return TrainingRun(
        nodes=nodes,
        workers=workers,
        step_time_s=stage.planned.seconds.total,
        steps=stage.steps,
        checkpoint_stall_s=stage.checkpoint / workers * stage.target.checkpoint_s_per_byte,
        upload_s=stage.checkpoint / nodes / _UPLOAD_RATE,
        checkpoint_interval_s=60.0 * stage.workload.training.checkpoint.interval_minutes,
    )


def scaling_table(name: str, report: ScalingReport) -> Table:
    """Return a table of speed, efficiency, goodput and bottleneck by number of GPUs."""
    table = Table("GPUs", title=f"{name}: finetuning at scale", title_justify="left")
    for heading in ("s/step", "hours", "GPU-hours", "efficiency", "goodput", "lost min", "lost nodes", "bottleneck"):
        table.add_column(heading, justify="left" if heading == "bottleneck" else "right")
    for scaled in report.scaled:
        outcome = scaled.outcome
        table.add_row(
            f"{scaled.workers:,}",
            f"{scaled.run.step_time_s:.3g}",
            f"{outcome.total_s / 3600:.2f}" if outcome.finished else "unfinished",
            f"{outcome.total_s / 3600 * scaled.workers:,.1f}" if outcome.finished else "-",
            f"{scaled.efficiency:.0%}" if outcome.finished else "-",
            f"{outcome.goodput:.1%}",
            f"{outcome.lost_work_s / 60:.1f}",
            f"{outcome.node_losses}",
            scaled.bottleneck,
            style="green" if scaled.workers == report.worthwhile_size else None if outcome.finished else "red",
        )
    assumptions = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in asdict(report.failures).items())
    table.caption = (
        f"each doubling up to {report.worthwhile_size:,} GPUs yields at least half of the ideal gain\n"
        f"checkpoints at {report.run.workers:,} GPUs: best every {report.best_interval_s / 60:.1f} min, "
        f"goodput {report.goodput:.1%} "
        f"(Young {report.young_interval_s / 60:.1f} min, Daly {report.daly_interval_s / 60:.1f} min)\n"
        f"assumed: {assumptions}"
    )
    table.caption_justify = "left"
    return table


def scaling_data(report: ScalingReport) -> dict[str, Any]:
    """Return the whole report as JSON-serializable values."""
    return asdict(report)
