"""Expansion of a sweep into variants (pure functions), and the records of how their trials ended."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from raylava.config.load import apply_override, read_recipe, set_key, validate
from raylava.config.recipe import Recipe
from raylava.errors import UserError
from raylava.tune.sweep import SearchConfig, SweepConfig

LOSS, SECONDS = "loss", "seconds"  # objectives of a search in addition to the benchmarks' scores

LOST = "the trial's process died repeatedly"  # failure of a trial that Ray Tune no longer restarts


@dataclass(frozen=True)
class Variant:
    """One recipe of a sweep.

    `levels` maps each axis to the variant's level; `seed` is None when the sweep lists no seeds; `searched` holds the
    settings suggested by a search; `settings` are all overrides of the sweep's base recipe, by recipe key.
    """

    levels: dict[str, str]
    seed: int | None
    settings: dict[str, Any]
    recipe: Recipe
    searched: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the variant's levels and settings: `connector=pretrained vision=clip seed=0 finetune.lr=2e-05`."""
        words = [f"{axis}={level}" for axis, level in self.levels.items()]
        if self.seed is not None:
            words.append(f"seed={self.seed}")
        return " ".join([*words, *(f"{key}={format_value(value)}" for key, value in self.searched.items())])


@dataclass(frozen=True)
class TrialRecord:
    """A trial as stored in its study.

    `outcome` is done, stopped (early) or failed, and None while the trial runs. `objectives` are set once it is done;
    `losses` are the mean finetuning losses by rung (1 to RUNGS).
    """

    number: int
    settings: Mapping[str, Any]
    outcome: str | None
    failure: str | None
    objectives: Mapping[str, float]
    losses: Mapping[int, float]


@dataclass(frozen=True)
class TrialResult:
    """A variant with all its settings and the outcome of its trial: done, stopped (early) or failed.

    `record` is the trial's entry in its study, None without a search. `is_valid_recipe` is False when a search
    suggested settings that form no valid recipe; the variant then holds the base recipe.
    """

    variant: Variant
    outcome: str
    failure: str | None = None
    record: TrialRecord | None = None
    is_valid_recipe: bool = True


def format_value(value: Any) -> str:
    """Return a searched value as text, floats with three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def variants(sweep: SweepConfig, overrides: list[str]) -> list[Variant]:
    """Return all combinations that are not excluded, in the order of the axes, seeds innermost.

    `overrides` (`key=value`) take precedence over the sweep's settings. Raises UserError when a combination is not a
    valid recipe, all combinations are excluded, or the search does not fit the recipe.
    """
    expanded = [
        _build_variant(sweep, levels, seed, overrides, {})
        for levels in _combinations(sweep)
        for seed in sweep.seeds or (None,)
    ]
    if not expanded:
        raise UserError("every combination of the sweep is excluded; remove an `exclude`")
    if sweep.search:
        _check_search(sweep, sweep.search, expanded[0], overrides)
    return expanded


def with_settings(sweep: SweepConfig, variant: Variant, searched: Mapping[str, Any], overrides: list[str]) -> Variant:
    """Return the variant with settings suggested by a search. Raises UserError when they form no valid recipe."""
    return _build_variant(sweep, variant.levels, variant.seed, overrides, searched)


def _combinations(sweep: SweepConfig) -> Iterator[dict[str, str]]:
    """Yield one level of each axis, by axis, for every combination that is not excluded."""
    for levels in itertools.product(*sweep.axes.values()):
        combination = dict(zip(sweep.axes, levels, strict=True))
        if not any(excluded.items() <= combination.items() for excluded in sweep.exclude):
            yield combination


def _build_variant(
    sweep: SweepConfig, levels: dict[str, str], seed: int | None, overrides: list[str], searched: Mapping[str, Any]
) -> Variant:
    """Apply, in this order: the sweep's `set`, the levels, the seed, the searched settings, the overrides."""
    settings: dict[str, Any] = dict(sweep.set)
    for axis, level in levels.items():
        settings |= sweep.axes[axis][level]
    if seed is not None:
        settings["seed"] = seed
    settings |= searched
    data = read_recipe(sweep.recipe)
    for key, value in settings.items():
        set_key(data, key, value)
    for override in overrides:
        apply_override(data, override)
    choices = {**levels, **searched}
    source = f"{sweep.name} ({', '.join(f'{name}={value}' for name, value in choices.items()) or 'the only variant'})"
    return Variant(levels, seed, settings, validate(data, source), searched)


def _check_search(sweep: SweepConfig, search: SearchConfig, first: Variant, overrides: list[str]) -> None:
    """Check that each end of each range is a valid recipe by itself and that the recipe yields every objective."""
    set_elsewhere = {key for axis in sweep.axes.values() for level in axis.values() for key in level} | set(sweep.set)
    set_elsewhere |= {override.partition("=")[0] for override in overrides} | ({"seed"} if sweep.seeds else set())
    for key, search_range in search.space.items():
        if key in set_elsewhere:
            raise UserError(
                f"search.space: {key} is also set by an axis, `set`, seeds or the command line; set it in one place"
            )
        for value in search_range.extremes:
            with_settings(sweep, first, {key: value}, overrides)
    objectives = [LOSS, SECONDS, *(benchmark.name for benchmark in first.recipe.evaluate)]
    for name in search.objective:
        if name not in objectives:
            raise UserError(f"search.objective: unknown objective {name!r}; choose one of: {', '.join(objectives)}")
