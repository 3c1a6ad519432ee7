"""A forecast at other sizes: the same recipe on 8 to thousands of GPUs, played through with failures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from raylava.cost.hardware import Cluster
from raylava.cost.speed import Speed
from raylava.estimate.forecast import Given, StageForecast, forecast, on_gpus
from raylava.estimate.simulate import (
    Run,
    Scaled,
    World,
    best_interval,
    between_failures,
    daly,
    goodput,
    pays,
    scaling,
    young,
)
from raylava.recipe import Recipe

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_UPLOAD = 1e9  # bytes/s of a node, to an object store


@dataclass(frozen=True)
class Played:
    """The finetuning stage at several sizes. Seconds: the best interval between checkpoints at the size asked for, and
    what Young's and Daly's formulas say; `goodput` there.
    """

    world: World
    scaled: list[Scaled]
    pays: int
    run: Run
    best: float
    young: float
    daly: float
    goodput: float


def played(
    recipe: Recipe, cluster: Cluster, speed: Speed, given: Given, world: World, sizes: Sequence[int] = SIZES
) -> Played:
    """Play the recipe's finetuning on the cluster's kind of nodes, at each number of GPUs and at the cluster's own."""

    def run_at(workers: int) -> tuple[Run, dict[str, float]]:
        nodes = max(1, workers // cluster.gpus)
        own = replace(cluster, nodes=nodes, gpus=min(workers, cluster.gpus))
        stage = forecast(recipe, on_gpus(own, speed), given, weighs_all=False).stages[-1]
        return _run(stage, nodes), asdict(stage.asked.seconds)

    scaled = scaling(sizes, run_at, world)
    run, _ = run_at(cluster.world_size)
    best = best_interval(run, world)
    mean = between_failures(run, world)
    save = run.save + run.upload  # nothing is safe before it is uploaded
    return Played(
        world,
        scaled,
        pays(scaled),
        run,
        best,
        young(save, mean),
        daly(save, mean),
        goodput(replace(run, interval=best), world),
    )


def _run(stage: StageForecast, nodes: int) -> Run:
    workers = stage.target.room.world_size
    return Run(
        nodes=nodes,
        workers=workers,
        step=stage.asked.seconds.total,
        steps=stage.steps,
        save=stage.checkpoint / workers * stage.target.save,
        upload=stage.checkpoint / nodes / _UPLOAD,
        interval=60.0 * stage.workload.training.checkpoints.every_minutes,
    )


def scale_table(name: str, found: Played) -> Table:
    """Speed, efficiency and goodput by size, and what holds it back."""
    table = Table("GPUs", title=f"{name}: finetuning at scale", title_justify="left")
    for heading in ("s/step", "hours", "GPU-hours", "efficiency", "goodput", "lost min", "losses", "held back by"):
        table.add_column(heading, justify="left" if heading == "held back by" else "right")
    for one in found.scaled:
        outcome = one.outcome
        table.add_row(
            f"{one.workers:,}",
            f"{one.run.step:.3g}",
            f"{outcome.seconds / 3600:.2f}",
            f"{outcome.seconds / 3600 * one.workers:,.1f}",
            f"{one.efficiency:.0%}",
            f"{outcome.goodput:.1%}",
            f"{outcome.lost / 60:.1f}",
            f"{outcome.failures}",
            one.bound,
            style="green" if one.workers == found.pays else None,
        )
    world = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in asdict(found.world).items())
    table.caption = (
        f"up to {found.pays:,} GPUs a doubling brings at least half of what it costs\n"
        f"checkpoints at {found.run.workers:,} GPUs: best every {found.best / 60:.1f} min, goodput {found.goodput:.1%} "
        f"(Young {found.young / 60:.1f}, Daly {found.daly / 60:.1f})\nassumed: {world} (seconds, rates as named)"
    )
    table.caption_justify = "left"
    return table


def data(found: Played) -> dict[str, Any]:
    """All of it, JSON-able."""
    return asdict(found)
