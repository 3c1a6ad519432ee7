"""A sweep's cost: every variant's stages forecast, those that variants share counted once. Without storage or hub."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from raylava.config.recipe import Recipe
from raylava.estimate.forecast import CORPUS_OF, Forecast, KnownCorpora, Target, forecast


@dataclass(frozen=True)
class SharedStage:
    """A distinct stage of a sweep: how many variants need it; hours of the cluster, hours × workers, and what these
    cost where a table names the nodes' price.
    """

    stage: str
    users: int
    hours: float
    worker_hours: float
    cost: float | None


def shared_stages(
    recipes: Sequence[Recipe],
    target_of: Callable[[Recipe, KnownCorpora], Target],
    given_of: Callable[[Recipe], KnownCorpora],
) -> list[SharedStage]:
    """The distinct stages of all variants. Two are the same when all that decides their result is."""
    first: dict[str, SharedStage] = {}
    users: dict[str, int] = {}
    for recipe in recipes:
        given = given_of(recipe)
        target = target_of(recipe, given)
        one = forecast(recipe, target, given, weighs_all=False)
        for stage, key, hours in _stages(recipe, one):
            workers = 0 if stage.startswith("prepare") else target.room.world_size
            cost = None if target.hourly is None else hours * target.hourly
            first.setdefault(key, SharedStage(stage, 0, hours, hours * workers, cost))
            users[key] = users.get(key, 0) + 1
    return [replace(piece, users=users[key]) for key, piece in first.items()]


def _stages(recipe: Recipe, one: Forecast) -> list[tuple[str, str, float]]:
    """(kind, what decides it, hours) of each of a recipe's stages."""
    found: list[tuple[str, str, float]] = []
    read: dict[str, Any] = {}
    connector: str | None = recipe.model.connector.weights
    for name in one.corpora:
        read[name] = _prepare_key(recipe, name, one)
        if name in one.prepare:
            found.append((f"prepare {name}", read[name], one.prepare[name].hours))
    for stage in one.stages:
        settings = getattr(recipe, stage.stage).fingerprint_fields()
        decides = [stage.stage, recipe.model.fingerprint_fields(), settings, recipe.seed, read[CORPUS_OF[stage.stage]]]
        key = json.dumps([*decides, connector if stage.stage == "finetune" else None], sort_keys=True)
        connector = key if stage.stage == "pretrain" else connector
        found.append((stage.stage, key, stage.seconds / 3600))
    return found


def _prepare_key(recipe: Recipe, name: str, one: Forecast) -> str:
    """Language models of one vocabulary share a tokenizer, and with it the blocks."""
    corpus = recipe.corpora.alignment if name == "alignment" else recipe.corpora.instruction
    assert corpus is not None
    shape = one.shape
    sources = [source.model_dump() for source in corpus.sources]
    decides = [
        corpus.fingerprint_fields(),
        sources,
        shape.language.vocabulary,
        shape.vision.patches,
        shape.vision.patch,
    ]
    return json.dumps(["prepare", recipe.data, *decides], sort_keys=True, default=str)


def shared_stages_table(name: str, trials: int, found: Sequence[SharedStage]) -> Table:
    """By kind of stage: how many, what they come to, and what sharing spares."""
    table = Table("stage", title=f"{name}: {trials} trials", title_justify="left")
    for heading in ("needed", "distinct", "hours", "worker-hours", "unshared worker-hours", "cost"):
        table.add_column(heading, justify="right")
    for kind in dict.fromkeys(one.stage for one in found):
        own = [one for one in found if one.stage == kind]
        table.add_row(kind, *_sums(own))
    table.add_section()
    table.add_row("all", *_sums(found))
    return table


def _sums(own: Sequence[SharedStage]) -> list[str]:
    return [
        f"{sum(one.users for one in own):,}",
        f"{len(own):,}",
        f"{sum(one.hours for one in own):,.1f}",
        f"{sum(one.worker_hours for one in own):,.1f}",
        f"{sum(one.worker_hours * one.users for one in own):,.1f}",
        "-" if any(one.cost is None for one in own) else f"{sum(one.cost or 0.0 for one in own):,.0f}",
    ]
