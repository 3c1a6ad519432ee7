"""What scores are made of: counts a unit, figures of their sums, intervals by resampling units. Pure functions.

A unit is what stands or falls together: a question, the two of a image (MME), the two of a pair (MMVP). Figures are
functions of the units' summed counts, so that a bootstrap (Efron & Tibshirani 1993) recomputes them exactly; units are
drawn with replacement within their category, whose sizes the benchmark fixed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_DRAWS = 2000
_PAIRED_DRAWS = 4000
_INTERVAL = (2.5, 97.5)  # percentiles
_AT_ONCE = 20_000_000  # weights held at a time


@dataclass(frozen=True)
class Metric:
    """A score and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """A benchmark's verdict. `figures` by name, the headline first; `credit` is what each question earned, 0 to 1.
    `protocol` names whose rules were applied.
    """

    benchmark: str
    protocol: str
    questions: int
    missing: tuple[str, ...]
    figures: Mapping[str, Metric]
    by_category: Mapping[str, Mapping[str, float]]
    credit: Mapping[str, float]

    @property
    def headline(self) -> tuple[str, Metric]:
        """The first figure and its name."""
        return next(iter(self.figures.items()))

    def metrics(self) -> dict[str, Any]:
        """For an artifact's record: all but each question's credit."""
        return {
            "benchmark": self.benchmark,
            "protocol": self.protocol,
            "questions": self.questions,
            "missing": len(self.missing),
            "headline": self.headline[0],
            "figures": {name: vars(figure) for name, figure in self.figures.items()},
            "by_category": {name: dict(figures) for name, figures in self.by_category.items()},
        }


Figures = Callable[[Array], dict[str, Array]]


@dataclass(frozen=True)
class ScoreTable:
    """(units, columns) counts, each unit's category, and what figures follow from sums over units.

    `figures` takes (…, columns) sums and gives (…) values by name. `credit` is each question's, in order.
    """

    counts: Array
    categories: Sequence[str]
    figures: Figures
    credit: Sequence[float]
    of_category: Figures | None = None  # where a category alone has figures of its own

    def over_all(self) -> dict[str, Metric]:
        """Every figure with its interval."""
        values = self.figures(self.counts.sum(axis=0))
        drawn = self.figures(self._resampled())
        found = {}
        for name, value in values.items():
            low, high = np.percentile(drawn[name], _INTERVAL)
            found[name] = Metric(float(value), float(low), float(high))
        return found

    def by_category(self) -> dict[str, dict[str, float]]:
        """Figures of each category alone, and the number of its units."""
        labels = np.array(self.categories)
        found = {}
        for name in sorted(set(self.categories)):
            own = self.counts[labels == name]
            figures = (self.of_category or self.figures)(own.sum(axis=0))
            found[name] = {"units": float(len(own))} | {figure: float(value) for figure, value in figures.items()}
        return found

    def _resampled(self) -> Array:
        """(draws, columns) sums over units drawn with replacement within each category."""
        generator = np.random.default_rng(0)
        labels = np.array(self.categories)
        total = np.zeros((_DRAWS, self.counts.shape[1]))
        for name in sorted(set(self.categories)):
            own = self.counts[labels == name]
            step = max(1, _AT_ONCE // len(own))
            for start in range(0, _DRAWS, step):
                draws = min(step, _DRAWS - start)
                weights = generator.multinomial(len(own), np.full(len(own), 1 / len(own)), draws)
                total[start : start + draws] += weights @ own
        return total


def paired_interval(differences: Array) -> tuple[float, float]:
    """The 95 % interval of the mean of (runs, questions) differences in credit, both drawn with replacement."""
    runs, questions = differences.shape
    generator = np.random.default_rng(0)
    drawn_runs = generator.multinomial(runs, np.full(runs, 1 / runs), _PAIRED_DRAWS) / runs
    means = np.empty(_PAIRED_DRAWS)
    step = max(1, _AT_ONCE // questions)
    for start in range(0, _PAIRED_DRAWS, step):
        part = slice(start, min(start + step, _PAIRED_DRAWS))
        drawn = generator.multinomial(questions, np.full(questions, 1 / questions), part.stop - start) / questions
        means[part] = np.einsum("dp,pq,dq->d", drawn_runs[part], differences, drawn, optimize=True)
    low, high = np.percentile(means, _INTERVAL)
    return float(low), float(high)


def share(right: Array, of: Array) -> Array:
    """right / of; 0 where there is nothing to divide by."""
    return np.divide(right, of, out=np.zeros_like(np.asarray(right, dtype=float)), where=np.asarray(of) > 0)
