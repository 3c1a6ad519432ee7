"""Renders forecasts as rich tables, and as plain values for JSON output."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from raylava.estimate.forecast import Forecast, StageForecast
from raylava.estimate.ingest import UNLIMITED_NODES, IngestPlan
from raylava.perf.search import Candidate


def sizes_table(forecast: Forecast) -> Table:
    """Return a table of model, data and FLOPs per stage, which do not depend on the target."""
    stages = forecast.stages
    table = Table("", title=f"{forecast.name}: model and data", title_justify="left")
    for stage in stages:
        table.add_column(stage.stage, justify="right")
    rows: list[tuple[str, list[str]]] = [
        ("samples", [f"{stage.workload.corpus.rows:,}" for stage in stages]),
        ("steps", [f"{stage.steps:,}" for stage in stages]),
        ("tokens per step", [f"{stage.workload.sampled_steps.tokens:,.0f}" for stage in stages]),
        ("longest sample, tokens", [f"{stage.workload.longest_sample:,}" for stage in stages]),
        ("trainable parameters", [f"{stage.model.parameters:,}" for stage in stages]),
        ("frozen parameters", [f"{stage.model.shape.parameters - stage.model.parameters:,}" for stage in stages]),
    ]
    for component in ("vision", "connector", "body", "logits"):
        flops = [getattr(stage.flops, component) for stage in stages]
        cells = [f"{passes.forward / 1e12:,.3g} + {passes.backward / 1e12:,.3g}" for passes in flops]
        rows.append((f"TFLOP per step, {component}", cells))
    rows += [
        ("total EFLOP", [f"{stage.flops.total * stage.steps / 1e18:,.3g}" for stage in stages]),
        ("checkpoint", [_bytes(stage.checkpoint) for stage in stages]),
        ("artifact", [_bytes(stage.result) for stage in stages]),
        ("blocks", [_bytes(stage.workload.corpus.bytes) for stage in stages]),
    ]
    for name, cells in rows:
        table.add_row(name, *cells)
    sources = dict.fromkeys(f"{name}: {corpus.source}" for name, corpus in forecast.corpora.items())
    table.caption = "\n".join([*sources, "FLOPs: forward + backward, without recomputation"])
    table.caption_justify = "left"
    return table


def candidates_table(stage: StageForecast) -> Table:
    """Return a table of the recipe's own configuration, the fastest one, and the best alternatives, with verdicts."""
    title = f"{stage.stage} on {stage.target.label}"
    table = Table(title=title, title_justify="left")
    table.add_column("ZeRO", no_wrap=True)
    for heading in ("packs", "states", "activations", "logits", "peak", "per step", "total"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for candidate, verdict in _representatives(stage):
        memory = candidate.memory
        states = memory.weights + memory.optimizer + memory.gradients + memory.bucket
        cells = [
            candidate.config.short_description,
            f"{candidate.config.max_tokens_per_pack:,}",
            *(_gigabytes(size) for size in (states, memory.activations, memory.logits, memory.peak)),
            _time(candidate.seconds.total),
            _time(candidate.seconds.total * stage.steps),
        ]
        style = "red" if candidate.infeasible else "green" if candidate is stage.best else None
        table.add_row(*cells, verdict, style=style)
    table.caption = _candidates_caption(stage)
    table.caption_justify = "left"
    return table


def _candidates_caption(stage: StageForecast) -> str:
    planned, target = stage.planned, stage.target
    terms = ", ".join(f"{name} {seconds:.3g}" for name, seconds in asdict(planned.seconds).items())
    sent = _bytes(planned.traffic.bytes_sent(target.budget.world_size))
    largest = "none" if stage.largest_pack is None else f"{stage.largest_pack:,}"
    return (
        f"GB per worker, {_gigabytes(target.budget.device)} usable; OOM (phase of the peak); "
        "bf16 sums: gradients of packs are summed in bf16\n"
        f"largest packs that fit with the recipe's settings: {largest}\n"
        f"the recipe's step: {terms} s; each worker sends {sent}; "
        f"{target.speed_of(stage.stage).source}"
    )


def _representatives(stage: StageForecast) -> list[tuple[Candidate, str]]:
    """Return the candidates to display with their verdicts.

    These are the recipe's own, the best, and for each ZeRO stage the fastest others, feasible and infeasible.
    """
    shown = [(stage.planned, f"recipe: {_objection(stage.planned)}".rstrip(": "))]
    if stage.best is not None:
        if stage.best.config == stage.planned.config:
            shown = [(stage.best, "recipe: fastest")]
        else:
            shown.append((stage.best, "fastest"))
    shown_configs = {candidate.config for candidate, _ in shown}
    for zero_stage in range(4):
        others = sorted(
            (
                candidate
                for candidate in stage.candidates
                if candidate.config.zero_stage == zero_stage and candidate.config not in shown_configs
            ),
            key=lambda candidate: candidate.seconds.total,
        )
        feasible = next((candidate for candidate in others if not candidate.infeasible), None)
        infeasible = next((candidate for candidate in others if candidate.infeasible), None)
        if feasible is not None and stage.best is not None:
            slowdown = feasible.seconds.total / stage.best.seconds.total - 1
            shown.append((feasible, _objection(feasible) or (f"{slowdown:+.0%}" if slowdown > 0.005 else "as fast")))
        if infeasible is not None:
            shown.append((infeasible, _objection(infeasible)))
    return shown


def _objection(candidate: Candidate) -> str:
    """Return a short form of the reason against the candidate, or an empty string."""
    if candidate.infeasible:
        return f"OOM ({candidate.memory.peak_phase})"
    return "bf16 sums" if candidate.warning else ""


def totals_table(forecasts: Sequence[Forecast]) -> Table:
    """Return a table of time and cost with a row for each recipe and target."""
    table = Table(title="time and cost", title_justify="left")
    for heading in ("recipe", "target"):
        table.add_column(heading, no_wrap=True)
    for heading in ("prepare", "pretrain", "finetune", "total", "node-hours", "worker-hours", "cost"):
        table.add_column(heading, justify="right")
    for forecast in forecasts:
        by_stage = {stage.stage: _time(stage.seconds) for stage in forecast.stages}
        workers = forecast.target.budget.world_size
        table.add_row(
            forecast.name,
            forecast.target.label,
            _time(3600 * sum(plan.hours for plan in forecast.prepare.values())),
            by_stage.get("pretrain", "-"),
            by_stage["finetune"],
            _time(3600 * forecast.hours),
            f"{forecast.node_hours:.2f}",
            f"{sum(stage.seconds for stage in forecast.stages) / 3600 * workers:.2f}",
            "does not fit" if not forecast.fits else "-" if forecast.cost is None else f"{forecast.cost:,.2f}",
            style=None if forecast.fits else "red",
        )
    table.caption = "with the recipe's own settings; without evaluation and node startup"
    table.caption_justify = "left"
    return table


def ingest_table(plans: Iterable[tuple[str, IngestPlan]]) -> Table:
    """Return a table of corpus preparation with a row for each plan."""
    table = Table(title="corpus preparation", title_justify="left")
    table.add_column("corpus", no_wrap=True)
    for heading in ("nodes", "images/s", "bottleneck", "index, stage", "time", "requests/s", "blocks", "max nodes"):
        table.add_column(heading, justify="left" if heading == "bottleneck" else "right", no_wrap=True)
    for name, plan in plans:
        table.add_row(
            name,
            f"{plan.nodes:,}",
            f"{plan.images_per_second:,.0f}",
            plan.bottleneck,
            _time(3600 * plan.staging_hours),
            _time(3600 * plan.hours),
            f"{plan.requests_per_second:,.0f}",
            _bytes(plan.stored_bytes),
            "-" if plan.max_nodes >= UNLIMITED_NODES else f"{plan.max_nodes:,}",
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


def forecast_data(forecast: Forecast) -> dict[str, Any]:
    """Return the whole forecast as JSON-serializable values, in bytes, seconds, hours and FLOPs."""
    return {
        "recipe": forecast.name,
        "target": forecast.target.label,
        "speed": asdict(forecast.target.speed),
        "parameters": forecast.shape.parameters,
        "corpora": {name: {"source": size.source, "rows": size.rows} for name, size in forecast.corpora.items()},
        "prepare": {name: asdict(plan) for name, plan in forecast.prepare.items()},
        "stages": {stage.stage: _stage_data(stage) for stage in forecast.stages},
        "hours": forecast.hours,
        "node_hours": forecast.node_hours,
        "cost": forecast.cost,
        "fits": forecast.fits,
    }


def _stage_data(stage: StageForecast) -> dict[str, Any]:
    return {
        "steps": stage.steps,
        "trainable_parameters": stage.model.parameters,
        "flops_per_step": asdict(stage.flops),
        "seconds": stage.seconds,
        "mfu": stage.mfu,
        "largest_pack_tokens": stage.largest_pack,
        "checkpoint_bytes": stage.checkpoint,
        "result_bytes": stage.result,
        "planned": _candidate_data(stage.planned),
        "best": None if stage.best is None else _candidate_data(stage.best),
        "candidates": [_candidate_data(candidate) for candidate in stage.candidates],
    }


def _candidate_data(candidate: Candidate) -> dict[str, Any]:
    return {
        "config": asdict(candidate.config),
        "memory": asdict(candidate.memory),
        "step_time_s": asdict(candidate.seconds),
        "traffic": asdict(candidate.traffic),
        "infeasible": candidate.infeasible,
    }
