"""Scores in a report: by category with 95 % intervals, beside the baselines and what the paper published."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raylava.evaluation.compare import PER_QUESTION_SCORES, QUESTIONS_FILE
from raylava.evaluation.published_scores import published_rows
from raylava.pipeline.results import EVALUATE_PREFIX, category_score
from raylava.pipeline.run_report.stages import BLANK, UNTRAINED, ReportStage

MODEL = "model"
COLUMNS = {MODEL: "", "blank images": f" ({BLANK})", "before training": f" ({UNTRAINED})"}  # name → suffix of the label
_MAJORITY = "majority answer"
_Z = 1.959964  # the 97.5 % point of the normal distribution
_TOLERANCE = 1e-9


def benchmark_names(stages: Sequence[ReportStage]) -> list[str]:
    """Return the benchmarks that the model is asked, whether it has answered or not."""
    labels = [stage.label.removeprefix(EVALUATE_PREFIX) for stage in stages if stage.kind == "evaluate"]
    return [label for label in labels if not label.endswith((f" ({BLANK})", f" ({UNTRAINED})"))]


def evaluations_of(name: str, stages: Sequence[ReportStage]) -> dict[str, ReportStage]:
    """Return the finished evaluations of a benchmark: the model's and those of its baselines, by column."""
    by_label = {stage.label: stage for stage in stages if stage.artifact}
    labels = {column: f"{EVALUATE_PREFIX}{name}{suffix}" for column, suffix in COLUMNS.items()}
    return {column: by_label[label] for column, label in labels.items() if label in by_label}


def benchmark_data(name: str, evaluations: Mapping[str, ReportStage]) -> dict[str, Any]:
    """Return the scores of one benchmark; without a score (a judge has yet to grade), only what was asked."""
    stage = evaluations[MODEL]
    metrics, fields = stage.metrics, stage.artifact.record["fingerprint_fields"] if stage.artifact else {}
    data = {
        "name": name,
        "questions": metrics["questions"],
        "missing": metrics.get("missing", 0),
        "scored": "scores" in metrics,
        "path": str(stage.path),
    }
    if not data["scored"]:
        return data
    columns = {column: each for column, each in evaluations.items() if "scores" in each.metrics}
    majority = metrics.get("majority")
    return data | {
        "metric": metrics["headline"].replace("_", " "),
        "protocol": metrics["protocol"],
        "scores": [{"name": key.replace("_", " "), **values} for key, values in metrics["scores"].items()],
        "columns": [*columns, *([_MAJORITY] if majority else [])],
        "rows": list(_rows(columns, majority)),
        "published": published_rows(fields.get("benchmark", {}).get("benchmark", "")),
    }


def _rows(columns: Mapping[str, ReportStage], majority: Mapping[str, float] | None) -> Iterator[dict[str, Any]]:
    """Yield a row per category and, last, one of all questions; a cell is None where the metric is undefined."""
    model = columns[MODEL].metrics
    by_category = {column: _scores_by_category(stage) for column, stage in columns.items()}
    for category, values in model["by_category"].items():
        cells = [
            _category_cell(stage.metrics, category, by_category[column].get(category, []))
            for column, stage in columns.items()
        ]
        constant = [_cell(majority.get(category))] if majority else []
        yield {"category": category, "questions": values["units"], "cells": cells + constant, "total": False}
    totals: list[dict[str, float] | None] = [
        dict(stage.metrics["scores"][stage.metrics["headline"]]) for stage in columns.values()
    ]
    constant = [_cell(majority["all"])] if majority else []
    yield {"category": "all", "questions": model["questions"], "cells": totals + constant, "total": True}


def _category_cell(metrics: Mapping[str, Any], category: str, scores: Sequence[float]) -> dict[str, float] | None:
    """Return a category's score, with an interval where the score is the mean over its questions."""
    value = category_score(metrics, category) if category in metrics["by_category"] else None
    if value is None or not scores or abs(sum(scores) / len(scores) - value) > _TOLERANCE:
        return _cell(value)
    low, high = mean_interval(value, len(scores))
    return {"value": value, "low": low, "high": high}


def _cell(value: float | None) -> dict[str, float] | None:
    return None if value is None else {"value": value}


def mean_interval(mean: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a mean of scores from 0 to 1; it is wider than needed for partial scores."""
    share = _Z**2 / count
    center = (mean + share / 2) / (1 + share)
    half = _Z * math.sqrt(mean * (1 - mean) / count + share / (4 * count)) / (1 + share)
    return max(0.0, center - half), min(1.0, center + half)


def _scores_by_category(stage: ReportStage) -> dict[str, list[float]]:
    scores = json.loads((stage.path / PER_QUESTION_SCORES).read_bytes())
    by_category: dict[str, list[float]] = defaultdict(list)
    for line in (stage.path / QUESTIONS_FILE).read_bytes().splitlines():
        question = json.loads(line)
        if question["question_id"] in scores:
            by_category[question["category"]].append(scores[question["question_id"]])
    return by_category
