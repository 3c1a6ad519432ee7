"""Forecasts for people (rich tables) and for programs (plain values)."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from raylava.estimate.forecast import Forecast, StageForecast
from raylava.estimate.ingest import MANY, IngestPlan
from raylava.perf.search import Candidate


def sizes_table(forecast: Forecast) -> Table:
    """The model, and what each stage has to do, wherever it runs."""
    table = Table("", title=f"{forecast.name}: what there is to do", title_justify="left")
    for stage in forecast.stages:
        table.add_column(stage.stage, justify="right")
    rows: list[tuple[str, list[str]]] = [
        ("samples", [f"{one.workload.corpus.rows:,}" for one in forecast.stages]),
        ("steps", [f"{one.steps:,}" for one in forecast.stages]),
        ("tokens a step", [f"{one.workload.sampled.tokens:,.0f}" for one in forecast.stages]),
        ("longest sample, tokens", [f"{one.workload.longest:,}" for one in forecast.stages]),
        ("parameters that train", [f"{one.model.parameters:,}" for one in forecast.stages]),
        (
            "parameters frozen",
            [f"{one.model.shape.parameters - one.model.parameters:,}" for one in forecast.stages],
        ),
    ]
    for part in ("vision", "connector", "body", "logits"):
        flops = [getattr(one.flops, part) for one in forecast.stages]
        told = [f"{one.forward / 1e12:,.3g} + {one.backward / 1e12:,.3g}" for one in flops]
        rows.append((f"TFLOP a step, {part}", told))
    rows += [
        ("EFLOP in all", [f"{one.flops.total * one.steps / 1e18:,.3g}" for one in forecast.stages]),
        ("a checkpoint", [_bytes(one.checkpoint) for one in forecast.stages]),
        ("the result", [_bytes(one.result) for one in forecast.stages]),
        ("blocks", [_bytes(one.workload.corpus.bytes) for one in forecast.stages]),
    ]
    for name, told in rows:
        table.add_row(name, *told)
    sources = dict.fromkeys(f"{name}: {one.source}" for name, one in forecast.corpora.items())
    table.caption = "\n".join([*sources, "FLOPs: forward + backward, without what is recomputed"])
    table.caption_justify = "left"
    return table


def ways_table(stage: StageForecast) -> Table:
    """The recipe's way, the fastest_feasible, and the best of each kind that is not it, with why."""
    title = f"{stage.stage} on {stage.target.label}"
    table = Table(title=title, title_justify="left")
    table.add_column("ZeRO", no_wrap=True)
    for heading in ("packs", "states", "activations", "logits", "peak", "a step", "all"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for option, verdict in _few(stage):
        held = option.memory
        states = held.weights + held.optimizer + held.gradients + held.bucket
        cells = [
            option.way.mode,
            f"{option.way.max_tokens_per_pack:,}",
            *(_gigabytes(part) for part in (states, held.activations, held.logits, held.peak)),
            _time(option.seconds.total),
            _time(option.seconds.total * stage.steps),
        ]
        style = "red" if option.infeasible else "green" if option is stage.best else None
        table.add_row(*cells, verdict, style=style)
    seconds = stage.asked.seconds
    parts = ", ".join(f"{name} {value:.3g}" for name, value in asdict(seconds).items())
    sent = stage.asked.traffic.sent(stage.target.room.world_size)
    largest = "none" if stage.largest_pack is None else f"{stage.largest_pack:,}"
    table.caption = (
        f"GB of a worker's memory, {_gigabytes(stage.target.room.device)} usable; too much (at its peak); "
        "bf16 sums: of packs' gradients\n"
        f"largest packs that fit as the recipe is: {largest}\n"
        f"a step of the recipe's: {parts} s; each worker sends {_bytes(sent)}; "
        f"{stage.target.speed_of(stage.stage).source}"
    )
    table.caption_justify = "left"
    return table


def _few(stage: StageForecast) -> list[tuple[Candidate, str]]:
    """The recipe's own, the cheapest, and for each ZeRO stage the fastest others: of those that fit, and that don't."""
    shown = [(stage.asked, f"recipe's: {_against(stage.asked)}".rstrip(": "))]
    if stage.best is not None:
        if stage.best.way == stage.asked.way:
            shown = [(stage.best, "recipe's: fastest")]
        else:
            shown.append((stage.best, "fastest"))
    told = {option.way for option, _ in shown}
    for zero in range(4):
        own = [one for one in stage.options if one.way.zero_stage == zero and one.way not in told]
        fitting = sorted((one for one in own if not one.infeasible), key=lambda one: one.seconds.total)
        failing = sorted((one for one in own if one.infeasible), key=lambda one: one.seconds.total)
        if fitting and stage.best is not None:
            slower = fitting[0].seconds.total / stage.best.seconds.total - 1
            shown.append((fitting[0], _against(fitting[0]) or (f"{slower:+.0%}" if slower > 0.005 else "as fast")))
        if failing:
            shown.append((failing[0], _against(failing[0])))
    return shown


def _against(option: Candidate) -> str:
    """What speaks against it, beside its peak; all of it is in the data."""
    if option.infeasible:
        return f"too much ({option.memory.at})"
    return "bf16 sums" if option.warning else ""


def totals_table(forecasts: Sequence[Forecast]) -> Table:
    """Time and cost, a line a recipe or cluster."""
    table = Table(title="time and cost", title_justify="left")
    for heading in ("recipe", "on"):
        table.add_column(heading, no_wrap=True)
    for heading in ("prepare", "pretrain", "finetune", "all", "node-hours", "worker-hours", "cost"):
        table.add_column(heading, justify="right")
    for one in forecasts:
        by_stage = {stage.stage: _time(stage.seconds) for stage in one.stages}
        workers = one.target.room.world_size
        table.add_row(
            one.name,
            one.target.label,
            _time(3600 * sum(plan.hours for plan in one.prepare.values())),
            by_stage.get("pretrain", "-"),
            by_stage["finetune"],
            _time(3600 * one.hours),
            f"{one.node_hours:.2f}",
            f"{sum(stage.seconds for stage in one.stages) / 3600 * workers:.2f}",
            "does not fit" if not one.fits else "-" if one.cost is None else f"{one.cost:,.2f}",
            style=None if one.fits else "red",
        )
    table.caption = "evaluating and the start of nodes are not counted; the recipe's own settings"
    table.caption_justify = "left"
    return table


def ingest_table(plans: Iterable[tuple[str, IngestPlan]]) -> Table:
    """Preparing, a line a corpus."""
    table = Table(title="preparing", title_justify="left")
    table.add_column("corpus", no_wrap=True)
    for heading in ("nodes", "images/s", "held by", "time", "requests/s", "blocks", "most nodes"):
        table.add_column(heading, justify="left" if heading == "held by" else "right", no_wrap=True)
    for name, one in plans:
        table.add_row(
            name,
            f"{one.nodes:,}",
            f"{one.rate:,.0f}",
            one.bound,
            _time(3600 * one.hours),
            f"{one.requests_per_second:,.0f}",
            _bytes(one.stored),
            "-" if one.nodes_at_most >= MANY else f"{one.nodes_at_most:,}",
        )
    return table


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.3g} {unit}"
    return f"{count / 1e3:,.3g} kB" if count else "-"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f}" if count >= 1e8 or not count else f"{count / 1e9:.1g}"


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds:.3g} s"


def data(forecast: Forecast) -> dict[str, Any]:
    """All of a forecast, JSON-able; bytes, seconds, hours, FLOPs."""
    return {
        "recipe": forecast.name,
        "on": forecast.target.label,
        "speed": asdict(forecast.target.speed),
        "parameters": forecast.shape.parameters,
        "corpora": {name: {"source": one.source, "rows": one.rows} for name, one in forecast.corpora.items()},
        "prepare": {name: asdict(one) for name, one in forecast.prepare.items()},
        "stages": {one.stage: _stage(one) for one in forecast.stages},
        "hours": forecast.hours,
        "node_hours": forecast.node_hours,
        "cost": forecast.cost,
        "fits": forecast.fits,
    }


def _stage(stage: StageForecast) -> dict[str, Any]:
    return {
        "steps": stage.steps,
        "trained": stage.model.parameters,
        "flops_per_step": asdict(stage.flops),
        "seconds": stage.seconds,
        "mfu": stage.mfu,
        "largest_pack_tokens": stage.largest_pack,
        "checkpoint_bytes": stage.checkpoint,
        "result_bytes": stage.result,
        "recipe": _option(stage.asked),
        "best": None if stage.best is None else _option(stage.best),
        "options": [_option(one) for one in stage.options],
    }


def _option(option: Candidate) -> dict[str, Any]:
    return {
        "way": asdict(option.way),
        "memory": asdict(option.memory),
        "step_seconds": asdict(option.seconds),
        "traffic": asdict(option.traffic),
        "infeasible": option.infeasible,
    }
