"""Predicts the cost of a sweep: forecasts the stages of every variant, and counts stages shared by variants once.

Needs neither storage nor the Hugging Face hub.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from raylava.config.recipe import Recipe
from raylava.estimate.forecast import STAGE_CORPUS, Forecast, KnownCorpora, Target, forecast


@dataclass(frozen=True)
class SharedStage:
    """A distinct stage of a sweep and the number of variants that use it.

    `hours` are hours of the cluster and `worker_hours` multiplies them by the number of workers; `cost` is None if no
    price is known.
    """

    stage: str
    used_by: int
    hours: float
    worker_hours: float
    cost: float | None


def shared_stages(
    recipes: Sequence[Recipe],
    target_of: Callable[[Recipe, KnownCorpora], Target],
    known_of: Callable[[Recipe], KnownCorpora],
) -> list[SharedStage]:
    """Return the distinct stages of all variants. Two stages are the same if all inputs of their results are equal."""
    stages: dict[str, SharedStage] = {}
    used_by: dict[str, int] = {}
    for recipe in recipes:
        known = known_of(recipe)
        target = target_of(recipe, known)
        variant = forecast(recipe, target, known, compare_all=False)
        for stage, key, hours in _stages(recipe, variant):
            workers = 0 if stage.startswith("prepare") else target.budget.world_size
            cost = None if target.price_per_hour is None else hours * target.price_per_hour
            stages.setdefault(key, SharedStage(stage, 0, hours, hours * workers, cost))
            used_by[key] = used_by.get(key, 0) + 1
    return [replace(stage, used_by=used_by[key]) for key, stage in stages.items()]


def _stages(recipe: Recipe, variant: Forecast) -> list[tuple[str, str, float]]:
    """Return (name, key, hours) of each stage of a recipe; stages with equal keys have equal results."""
    stages: list[tuple[str, str, float]] = []
    corpus_keys: dict[str, str] = {}
    connector: str | None = recipe.model.connector.weights
    for name in variant.corpora:
        corpus_keys[name] = _prepare_key(recipe, name, variant)
        if name in variant.prepare:
            stages.append((f"prepare {name}", corpus_keys[name], variant.prepare[name].hours))
    for stage in variant.stages:
        settings = getattr(recipe, stage.stage).fingerprint_fields()
        corpus_key = corpus_keys[STAGE_CORPUS[stage.stage]]
        inputs = [stage.stage, recipe.model.fingerprint_fields(), settings, recipe.seed, corpus_key]
        key = json.dumps([*inputs, connector if stage.stage == "finetune" else None], sort_keys=True)
        connector = key if stage.stage == "pretrain" else connector
        stages.append((stage.stage, key, stage.seconds / 3600))
    return stages


def _prepare_key(recipe: Recipe, name: str, variant: Forecast) -> str:
    """Return the key of a prepared corpus; language models with equal vocabularies share a tokenizer and its blocks."""
    corpus = recipe.corpora.alignment if name == "alignment" else recipe.corpora.instruction
    assert corpus is not None
    shape = variant.shape
    inputs: list[Any] = [
        corpus.fingerprint_fields(),
        [source.model_dump() for source in corpus.sources],
        shape.language.vocabulary,
        shape.vision.patches,
        shape.vision.patch,
    ]
    return json.dumps(["prepare", recipe.data, *inputs], sort_keys=True, default=str)


def shared_stages_table(name: str, trials: int, stages: Sequence[SharedStage]) -> Table:
    """Return a table with a row for each kind of stage: counts, hours, and hours without sharing."""
    table = Table("stage", title=f"{name}: {trials} trials", title_justify="left")
    for heading in ("needed", "distinct", "hours", "worker-hours", "unshared worker-hours", "cost"):
        table.add_column(heading, justify="right")
    for kind in dict.fromkeys(stage.stage for stage in stages):
        table.add_row(kind, *_sums([stage for stage in stages if stage.stage == kind]))
    table.add_section()
    table.add_row("total", *_sums(stages))
    return table


def _sums(stages: Sequence[SharedStage]) -> list[str]:
    costs = [stage.cost for stage in stages]
    return [
        f"{sum(stage.used_by for stage in stages):,}",
        f"{len(stages):,}",
        f"{sum(stage.hours for stage in stages):,.1f}",
        f"{sum(stage.worker_hours for stage in stages):,.1f}",
        f"{sum(stage.worker_hours * stage.used_by for stage in stages):,.1f}",
        "-" if None in costs else f"{sum(cost or 0.0 for cost in costs):,.0f}",
    ]
