"""Axes → variants: pure functions from a sweep to recipes."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raylava.errors import UserError
from raylava.recipe import Recipe
from raylava.recipe_file import override_key, put, read_recipe, validate
from raylava.tune.sweep import Sweep


@dataclass(frozen=True)
class Variant:
    """One recipe of a sweep: which level of each axis it has, its seed (None where the sweep names none), and the
    settings that follow.
    """

    levels: dict[str, str]
    seed: int | None
    settings: dict[str, Any]  # by recipe key, over the sweep's base
    recipe: Recipe

    @property
    def name(self) -> str:
        """The variant in words: `connector=pretrained vision=clip seed=0`."""
        words = [f"{axis}={level}" for axis, level in self.levels.items()]
        return " ".join(words if self.seed is None else [*words, f"seed={self.seed}"])


def variants(sweep: Sweep, overrides: list[str]) -> list[Variant]:
    """All combinations but the excluded, in the order of the axes, seeds innermost. `overrides` come last of all.

    Raises UserError when a combination is no valid recipe, or all are excluded.
    """
    found = [
        _variant(sweep, levels, seed, overrides) for levels in _combinations(sweep) for seed in sweep.seeds or (None,)
    ]
    if not found:
        raise UserError("every combination of the sweep is excluded; remove an `exclude`")
    return found


def _combinations(sweep: Sweep) -> Iterator[dict[str, str]]:
    for levels in itertools.product(*sweep.axes.values()):
        combination = dict(zip(sweep.axes, levels, strict=True))
        if not any(out.items() <= combination.items() for out in sweep.exclude):
            yield combination


def _variant(sweep: Sweep, levels: dict[str, str], seed: int | None, overrides: list[str]) -> Variant:
    settings: dict[str, Any] = dict(sweep.set)
    for axis, level in levels.items():
        settings |= sweep.axes[axis][level]
    if seed is not None:
        settings["seed"] = seed
    data = read_recipe(sweep.recipe)
    for key, value in settings.items():
        put(data, key, value)
    for override in overrides:
        override_key(data, override)
    where = f"{sweep.name} ({', '.join(f'{axis}={level}' for axis, level in levels.items()) or 'the only variant'})"
    return Variant(levels, seed, settings, validate(data, where))
