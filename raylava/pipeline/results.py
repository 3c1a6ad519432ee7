"""Read the results of a run from its artifacts: summaries, scored benchmarks, headline scores. No terminal output."""

from collections.abc import Mapping
from typing import Any

from raylava.artifacts import Artifact
from raylava.config.recipe import Resources

EVALUATE_PREFIX = "evaluate "  # stage labels: `evaluate NAME`, `evaluate NAME (blank)`, `evaluate NAME (untrained)`


def summarize(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return fingerprint, path and metrics by stage label, as JSON-serializable values."""
    return {
        label: {"fingerprint": artifact.fingerprint, "path": str(artifact.path), "metrics": artifact.metrics}
        for label, artifact in artifacts.items()
    }


def answered_benchmarks(artifacts: Mapping[str, Artifact]) -> list[str]:
    """Return the names of the benchmarks that the trained model answered."""
    names = [label.removeprefix(EVALUATE_PREFIX) for label in artifacts if label.startswith(EVALUATE_PREFIX)]
    return [name for name in names if not name.endswith(")")]


def scored_benchmarks(artifacts: Mapping[str, Artifact]) -> list[str]:
    """Return the names of the benchmarks that the trained model answered and that have a score."""
    return [name for name in answered_benchmarks(artifacts) if is_scored(artifacts[EVALUATE_PREFIX + name])]


def is_scored(evaluation: Artifact) -> bool:
    """Return whether an evaluation has scores; answers that wait for a judge have none."""
    return "scores" in evaluation.metrics


def headline_score(evaluation: Artifact) -> float:
    """Return the value of the evaluation's headline metric."""
    return float(evaluation.metrics["scores"][evaluation.metrics["headline"]]["value"])


def category_score(metrics: Mapping[str, Any], category: str) -> float | None:
    """Return a category's headline metric, or the metric that only categories have (MME's points).

    None where the headline metric is undefined: accuracy over images of ScienceQA's questions without one.
    """
    scores = metrics["by_category"][category]
    if metrics["headline"] in scores:
        return float(scores[metrics["headline"]])
    own = [name for name in scores if name != "units" and name not in metrics["scores"]]
    return float(scores[own[0]]) if own else None


def device_hours_per_second(resources: Resources) -> float:
    """Return the device-hours (GPUs, or CPU cores without GPUs) of one second of training."""
    return resources.workers * (resources.gpus_per_worker or resources.cpus_per_worker) / 3600
