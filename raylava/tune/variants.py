"""Axes and searched settings → variants: pure functions from a sweep to recipes."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from raylava.config.load import override_key, put, read_recipe, validate
from raylava.config.recipe import Recipe
from raylava.errors import UserError
from raylava.tune.sweep import Search, Sweep

LOSS, SECONDS = "loss", "seconds"  # what a search may weigh besides the benchmarks


@dataclass(frozen=True)
class Variant:
    """One recipe of a sweep: which level of each axis it has, its seed (None where the sweep names none), the settings
    that a search gave it, and all settings that follow.
    """

    levels: dict[str, str]
    seed: int | None
    settings: dict[str, Any]  # by recipe key, over the sweep's base
    recipe: Recipe
    searched: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The variant in words: `connector=pretrained vision=clip seed=0 finetune.lr=2e-05`."""
        words = [f"{axis}={level}" for axis, level in self.levels.items()]
        if self.seed is not None:
            words.append(f"seed={self.seed}")
        return " ".join([*words, *(f"{key}={shown(value)}" for key, value in self.searched.items())])


def shown(value: Any) -> str:
    """A searched value, short enough for a table."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def variants(sweep: Sweep, overrides: list[str]) -> list[Variant]:
    """All combinations but the excluded, in the order of the axes, seeds innermost. `overrides` come last of all.

    Raises UserError when a combination is no valid recipe, all are excluded, or a search does not fit the recipe.
    """
    found = [
        _variant(sweep, levels, seed, overrides, {})
        for levels in _combinations(sweep)
        for seed in sweep.seeds or (None,)
    ]
    if not found:
        raise UserError("every combination of the sweep is excluded; remove an `exclude`")
    if sweep.search:
        _check_search(sweep, sweep.search, found[0], overrides)
    return found


def with_settings(sweep: Sweep, variant: Variant, searched: Mapping[str, Any], overrides: list[str]) -> Variant:
    """The variant with settings that a search gives it. Raises UserError when that is no valid recipe."""
    return _variant(sweep, variant.levels, variant.seed, overrides, searched)


def _combinations(sweep: Sweep) -> Iterator[dict[str, str]]:
    for levels in itertools.product(*sweep.axes.values()):
        combination = dict(zip(sweep.axes, levels, strict=True))
        if not any(out.items() <= combination.items() for out in sweep.exclude):
            yield combination


def _variant(
    sweep: Sweep, levels: dict[str, str], seed: int | None, overrides: list[str], searched: Mapping[str, Any]
) -> Variant:
    settings: dict[str, Any] = dict(sweep.set)
    for axis, level in levels.items():
        settings |= sweep.axes[axis][level]
    if seed is not None:
        settings["seed"] = seed
    settings |= searched
    data = read_recipe(sweep.recipe)
    for key, value in settings.items():
        put(data, key, value)
    for override in overrides:
        override_key(data, override)
    chosen = {**levels, **searched}
    where = f"{sweep.name} ({', '.join(f'{name}={value}' for name, value in chosen.items()) or 'the only variant'})"
    return Variant(levels, seed, settings, validate(data, where), searched)


def _check_search(sweep: Sweep, search: Search, first: Variant, overrides: list[str]) -> None:
    """Each end of each range, alone, must be a recipe, and each objective something that the recipe gives."""
    given = {key for axis in sweep.axes.values() for level in axis.values() for key in level} | set(sweep.set)
    given |= {override.partition("=")[0] for override in overrides} | ({"seed"} if sweep.seeds else set())
    for key, values in search.space.items():
        if key in given:
            raise UserError(f"search.space: {key} is set by an axis, `set`, seeds or the command line too; keep one")
        for value in values.extremes:
            with_settings(sweep, first, {key: value}, overrides)
    known = [LOSS, SECONDS, *(benchmark.name for benchmark in first.recipe.evaluate)]
    for name in search.objective:
        if name not in known:
            raise UserError(
                f"search.objective: {name!r} is nothing that a trial reaches; known here: {', '.join(known)}"
            )
