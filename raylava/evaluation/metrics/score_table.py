"""Score tables: counts per unit, metrics computed from their sums, and intervals by resampling units. Pure functions.

A unit is what is scored as a whole: a question, both questions of an image (MME) or both questions of a pair (MMVP).
Metrics are functions of the summed counts of units, so a bootstrap (Efron & Tibshirani 1993) recomputes them exactly.
Units are drawn with replacement within their category, because the benchmark fixes the size of each category.
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
_MAX_WEIGHTS = 20_000_000  # bootstrap weights in memory at once


@dataclass(frozen=True)
class Metric:
    """The value of a metric and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class BenchmarkResult:
    """The scores of one benchmark.

    `scores` maps metric names to values, the headline metric first. `per_question` maps question ids to scores from 0
    to 1. `protocol` names the toolkit whose scoring rules were applied, `missing` lists ids of unanswered questions.
    """

    benchmark: str
    protocol: str
    questions: int
    missing: tuple[str, ...]
    scores: Mapping[str, Metric]
    by_category: Mapping[str, Mapping[str, float]]
    per_question: Mapping[str, float]

    @property
    def headline(self) -> tuple[str, Metric]:
        """The name and value of the first metric."""
        return next(iter(self.scores.items()))

    def metrics(self) -> dict[str, Any]:
        """Return everything except the per-question scores, as JSON types for an artifact's record."""
        return {
            "benchmark": self.benchmark,
            "protocol": self.protocol,
            "questions": self.questions,
            "missing": len(self.missing),
            "headline": self.headline[0],
            "scores": {name: vars(metric) for name, metric in self.scores.items()},
            "by_category": {name: dict(metrics) for name, metrics in self.by_category.items()},
        }


ComputeMetrics = Callable[[Array], dict[str, Array]]


@dataclass(frozen=True)
class ScoreTable:
    """Counts of shape (units, columns), the category of each unit, and the metrics computed from sums over units.

    `compute` maps sums of shape (…, columns) to metric values of shape (…) by name. `per_question_scores` has one score
    per question, in question order. `compute_category` replaces `compute` for the metrics of a single category.
    """

    counts: Array
    categories: Sequence[str]
    compute: ComputeMetrics
    per_question_scores: Sequence[float]
    compute_category: ComputeMetrics | None = None

    def overall(self) -> dict[str, Metric]:
        """Return every metric over all units, with its interval."""
        values = self.compute(self.counts.sum(axis=0))
        resampled = self.compute(self._resampled_sums())
        metrics = {}
        for name, value in values.items():
            low, high = np.percentile(resampled[name], _INTERVAL)
            metrics[name] = Metric(float(value), float(low), float(high))
        return metrics

    def by_category(self) -> dict[str, dict[str, float]]:
        """Return the metrics of each category alone, and its number of units under the key `units`."""
        labels = np.array(self.categories)
        compute = self.compute_category or self.compute
        by_category = {}
        for category in sorted(set(self.categories)):
            counts = self.counts[labels == category]
            values = {name: float(value) for name, value in compute(counts.sum(axis=0)).items()}
            by_category[category] = {"units": float(len(counts))} | values
        return by_category

    def _resampled_sums(self) -> Array:
        """Return (draws, columns) sums over units drawn with replacement within each category."""
        generator = np.random.default_rng(0)
        labels = np.array(self.categories)
        sums = np.zeros((_DRAWS, self.counts.shape[1]))
        for category in sorted(set(self.categories)):
            counts = self.counts[labels == category]
            step = max(1, _MAX_WEIGHTS // len(counts))
            for start in range(0, _DRAWS, step):
                draws = min(step, _DRAWS - start)
                weights = generator.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), draws)
                sums[start : start + draws] += weights @ counts
        return sums


def paired_interval(differences: Array) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of (runs, questions) score differences.

    Runs and questions are both drawn with replacement.
    """
    runs, questions = differences.shape
    generator = np.random.default_rng(0)
    run_weights = generator.multinomial(runs, np.full(runs, 1 / runs), _PAIRED_DRAWS) / runs
    means = np.empty(_PAIRED_DRAWS)
    step = max(1, _MAX_WEIGHTS // questions)
    for start in range(0, _PAIRED_DRAWS, step):
        rows = slice(start, min(start + step, _PAIRED_DRAWS))
        question_weights = generator.multinomial(questions, np.full(questions, 1 / questions), rows.stop - start)
        means[rows] = np.einsum(
            "dp,pq,dq->d", run_weights[rows], differences, question_weights / questions, optimize=True
        )
    low, high = np.percentile(means, _INTERVAL)
    return float(low), float(high)


def ratio(numerator: Array, denominator: Array) -> Array:
    """Return numerator / denominator, and 0 where the denominator is 0."""
    zeros = np.zeros_like(np.asarray(numerator, dtype=float))
    return np.divide(numerator, denominator, out=zeros, where=np.asarray(denominator) > 0)
