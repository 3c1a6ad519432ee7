"""A forecast at other sizes: the same recipe on a node to thousands of GPUs, played through with failures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from raylava.config.recipe import Recipe
from raylava.errors import UserError
from raylava.estimate.forecast import KnownCorpora, StageForecast, forecast, on_gpus
from raylava.estimate.simulate import (
    FailureModel,
    Run,
    Scaled,
    best_interval,
    between_failures,
    daly,
    goodput,
    scaling,
    worthwhile_size,
    young,
)
from raylava.perf.hardware import Cluster
from raylava.perf.step_time import Speed

_MOST = 4096  # GPUs
_UPLOAD = 1e9  # bytes/s of a node, to an object store


@dataclass(frozen=True)
class ScalingReport:
    """The finetuning stage at several sizes. Seconds: the best interval between checkpoints at the size asked for, and
    what Young's and Daly's formulas say; `goodput` there.
    """

    world: FailureModel
    scaled: list[Scaled]
    worthwhile_size: int
    run: Run
    best: float
    young: float
    daly: float
    goodput: float


def simulate_scaling(
    recipe: Recipe, cluster: Cluster, speed: Speed, given: KnownCorpora, world: FailureModel, nodes: Sequence[int] = ()
) -> ScalingReport:
    """Play the recipe's finetuning on so many of the cluster's nodes (1, 2, 4, … by default), and on its own number.

    Raises UserError where it does not fit the cluster.
    """

    def finetuning(count: int) -> StageForecast:
        return forecast(recipe, on_gpus(replace(cluster, nodes=count), speed), given, weighs_all=False).stages[-1]

    own = finetuning(cluster.nodes)
    if own.asked.infeasible:
        raise UserError(f"finetune does not fit {own.target.label}: {own.asked.infeasible}; see the ways that do above")
    stages = {count * cluster.gpus: finetuning(count) for count in nodes or _doublings(_MOST // cluster.gpus)}
    fitting = [workers for workers, stage in stages.items() if not stage.asked.infeasible]
    scaled = scaling(fitting, lambda workers: (_run(stages[workers]), asdict(stages[workers].asked.seconds)), world)
    run = _run(own)
    best, mean = best_interval(run, world), between_failures(run, world)
    save = run.save + run.upload  # nothing is safe before it is uploaded
    return ScalingReport(
        world,
        scaled,
        worthwhile_size(scaled),
        run,
        best,
        young(save, mean),
        daly(save, mean),
        goodput(replace(run, interval=best), world),
    )


def _doublings(most: int) -> list[int]:
    return [2**power for power in range(max(1, most).bit_length()) if 2**power <= max(1, most)]


def _run(stage: StageForecast) -> Run:
    workers, nodes = stage.target.room.world_size, stage.target.nodes
    return Run(
        nodes=nodes,
        workers=workers,
        step=stage.asked.seconds.total,
        steps=stage.steps,
        save=stage.checkpoint / workers * stage.target.save,
        upload=stage.checkpoint / nodes / _UPLOAD,
        interval=60.0 * stage.workload.training.checkpoint.interval_minutes,
    )


def scale_table(name: str, found: ScalingReport) -> Table:
    """Speed, efficiency and goodput by size, and what holds it back."""
    table = Table("GPUs", title=f"{name}: finetuning at scale", title_justify="left")
    for heading in ("s/step", "hours", "GPU-hours", "efficiency", "goodput", "lost min", "losses", "held back by"):
        table.add_column(heading, justify="left" if heading == "held back by" else "right")
    for one in found.scaled:
        outcome = one.outcome
        table.add_row(
            f"{one.workers:,}",
            f"{one.run.step:.3g}",
            f"{outcome.seconds / 3600:.2f}" if outcome.finished else "no end",
            f"{outcome.seconds / 3600 * one.workers:,.1f}" if outcome.finished else "-",
            f"{one.efficiency:.0%}" if outcome.finished else "-",
            f"{outcome.goodput:.1%}",
            f"{outcome.lost / 60:.1f}",
            f"{outcome.failures}",
            one.bound,
            style="green" if one.workers == found.worthwhile_size else None if outcome.finished else "red",
        )
    world = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in asdict(found.world).items())
    table.caption = (
        f"up to {found.worthwhile_size:,} GPUs a doubling brings at least half of what it costs\n"
        f"checkpoints at {found.run.workers:,} GPUs: best every {found.best / 60:.1f} min, goodput {found.goodput:.1%} "
        f"(Young {found.young / 60:.1f}, Daly {found.daly / 60:.1f})\nassumed: {world} (seconds, rates as named)"
    )
    table.caption_justify = "left"
    return table


def data(found: ScalingReport) -> dict[str, Any]:
    """All of it, JSON-able."""
    return asdict(found)
