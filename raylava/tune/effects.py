"""Effect of each level of an axis on a benchmark's score, with a confidence interval. Pure functions.

Variants that differ in a single axis are paired, seed by seed; the effect is the mean difference of their scores over
pairs and questions. The interval is a paired bootstrap that resamples both runs and questions (Efron & Tibshirani 1993;
over questions as in Koehn 2004), so that few pairs give a wide interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raylava.evaluation.metrics.score_table import paired_interval


@dataclass(frozen=True)
class GradedVariant:
    """One variant's scores (0 to 1) on the questions of one benchmark, by question id."""

    levels: Mapping[str, str]
    seed: int | None
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Effect:
    """Mean score difference of `level` of `axis` to `reference_level`, with its 95 % interval (`low` to `high`).

    Differences are fractions (0.01 is one percentage point). `pairs` and `questions` are the sizes of the sample.
    """

    axis: str
    level: str
    reference_level: str
    difference: float
    low: float
    high: float
    pairs: int
    questions: int

    @property
    def spans_zero(self) -> bool:
        return self.low <= 0.0 <= self.high


def estimate_effects(variants: Sequence[GradedVariant], axes: Mapping[str, Sequence[str]]) -> list[Effect]:
    """Return, for each axis, the effect of each level relative to the axis's first level.

    Levels without a pair of variants are omitted. Raises ValueError when paired variants answered different questions.
    """
    effects = []
    for axis, (reference_level, *levels) in axes.items():
        for level in levels:
            pairs = _pair_variants(variants, axis, level, reference_level)
            if pairs:
                effects.append(_estimate_effect(axis, level, reference_level, pairs))
    return effects


def _pair_variants(
    variants: Sequence[GradedVariant], axis: str, level: str, reference_level: str
) -> list[tuple[GradedVariant, GradedVariant]]:
    """Return (variant, reference) pairs that differ only in `axis`."""
    references = {
        _other_settings(variant, axis): variant for variant in variants if variant.levels[axis] == reference_level
    }
    return [
        (variant, references[_other_settings(variant, axis)])
        for variant in variants
        if variant.levels[axis] == level and _other_settings(variant, axis) in references
    ]


def _other_settings(variant: GradedVariant, axis: str) -> tuple[object, ...]:
    """Return the seed and the levels of all axes except `axis`."""
    return (variant.seed, *(level for name, level in variant.levels.items() if name != axis))


def _estimate_effect(
    axis: str, level: str, reference_level: str, pairs: list[tuple[GradedVariant, GradedVariant]]
) -> Effect:
    differences = np.stack([_score_differences(variant, reference) for variant, reference in pairs])
    low, high = paired_interval(differences)
    pair_count, question_count = differences.shape
    return Effect(axis, level, reference_level, float(differences.mean()), low, high, pair_count, question_count)


def _score_differences(variant: GradedVariant, reference: GradedVariant) -> npt.NDArray[np.float64]:
    """Return the variant's score minus the reference's for each question, shape (questions,)."""
    if variant.scores.keys() != reference.scores.keys():
        unmatched = sorted(variant.scores.keys() ^ reference.scores.keys())
        raise ValueError(f"variants answered different questions: {', '.join(unmatched[:3])}")
    return np.array([float(score) - float(reference.scores[name]) for name, score in variant.scores.items()])
