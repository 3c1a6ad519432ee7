"""What a level of an axis buys, with an interval that counts both questions and runs as samples. Pure functions.

Variants that differ in one axis alone are paired, seed by seed; the effect is the mean over pairs and questions of the
difference in right answers. The interval is a paired bootstrap over both (Efron & Tibshirani 1993; over questions as in
Koehn 2004): with few pairs it is wide, as it should be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raylava.evaluate.metrics.score_table import paired_interval


@dataclass(frozen=True)
class Graded:
    """One variant's answers to one benchmark: what each earned (0 to 1), by question id."""

    levels: Mapping[str, str]
    seed: int | None
    credit: Mapping[str, float]


@dataclass(frozen=True)
class Effect:
    """What `level` of `axis` gives over `against`, as a share of the questions, with its 95 % interval."""

    axis: str
    level: str
    against: str
    difference: float
    low: float
    high: float
    pairs: int
    questions: int

    @property
    def spans_zero(self) -> bool:
        return self.low <= 0.0 <= self.high


def effects(graded: Sequence[Graded], axes: Mapping[str, Sequence[str]]) -> list[Effect]:
    """For each axis, each of its levels against the first; levels without a pair of variants are left out.

    Raises ValueError when variants answered different questions.
    """
    found = []
    for axis, (first, *others) in axes.items():
        for level in others:
            pairs = _pairs(graded, axis, level, first)
            if pairs:
                found.append(_effect(axis, level, first, pairs))
    return found


def _pairs(graded: Sequence[Graded], axis: str, level: str, against: str) -> list[tuple[Graded, Graded]]:
    others = {_rest(one, axis): one for one in graded if one.levels[axis] == against}
    return [
        (one, others[_rest(one, axis)]) for one in graded if one.levels[axis] == level and _rest(one, axis) in others
    ]


def _rest(one: Graded, axis: str) -> tuple[object, ...]:
    return (one.seed, *(level for name, level in one.levels.items() if name != axis))


def _effect(axis: str, level: str, against: str, pairs: list[tuple[Graded, Graded]]) -> Effect:
    differences = np.stack([_differences(one, other) for one, other in pairs])
    low, high = paired_interval(differences)
    count, questions = differences.shape
    return Effect(axis, level, against, float(differences.mean()), low, high, count, questions)


def _differences(one: Graded, other: Graded) -> npt.NDArray[np.float64]:
    """By question, what the one earned more than the other."""
    if one.credit.keys() != other.credit.keys():
        apart = sorted(one.credit.keys() ^ other.credit.keys())
        raise ValueError(f"variants answered different questions: {', '.join(apart[:3])}")
    return np.array([float(credit) - float(other.credit[name]) for name, credit in one.credit.items()])
