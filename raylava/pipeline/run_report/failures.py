"""What went wrong in a run and was survived, from what its artifacts record."""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from raylava.evaluation.compare import ANSWERS_FILE
from raylava.pipeline.run_report.stages import ReportStage
from raylava.pipeline.run_report.training import TRAINING_STAGES
from raylava.train.step_log import METRICS_LOG, STEP_LOG, recorded_steps

_TENSORBOARD = "tensorboard"  # folder of a training artifact; the first worker begins a file there each time it starts
_MAX_STEPS = 10  # steps that an entry names


def stage_failures(stage: ReportStage) -> list[dict[str, Any]]:
    """Return one entry per kind of failure: the stage, the event, how often it occurred, and a detail."""
    if stage.kind in TRAINING_STAGES:
        failures = _training_failures(stage)
    elif stage.kind == "prepare":
        failures = _corpus_failures(stage)
    else:
        failures = _evaluation_failures(stage)
    return [
        {"stage": stage.label, "event": event, "count": count, "detail": detail}
        for event, count, detail in failures
        if count
    ]


def _training_failures(stage: ReportStage) -> Iterator[tuple[str, float, str]]:
    attempts = len([file for file in (stage.path / _TENSORBOARD).children() if ".tfevents." in file.name])
    yield "restarts of training", max(0, attempts - 1), "resumed from the last checkpoint, or from the start"
    sizes = [(step["step"], step["world_size"]) for step in _step_log(stage)]
    changes = [
        f"{before} → {after} at step {number}" for (_, before), (number, after) in pairwise(sizes) if before != after
    ]
    yield "changes of the number of workers", len(changes), "; ".join(changes[:_MAX_STEPS])
    steps = recorded_steps(stage.path)
    skipped = [str(step["step"]) for step in steps if step.get("skipped")]
    more = f" and {len(skipped) - _MAX_STEPS} more" if len(skipped) > _MAX_STEPS else ""
    yield "skipped steps", len(skipped), f"loss or gradient not finite: steps {', '.join(skipped[:_MAX_STEPS])}{more}"
    stall = sum(step.get("checkpoint_stall_s", 0.0) for step in steps)
    yield "seconds that training stood still for checkpoints", round(stall, 1), f"of {METRICS_LOG}"


def _step_log(stage: ReportStage) -> list[dict[str, Any]]:
    file = stage.path / STEP_LOG
    return [json.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []


def _corpus_failures(stage: ReportStage) -> Iterator[tuple[str, float, str]]:
    for reason, count in stage.metrics.get("quarantine", {}).items():
        yield f"rows left out: {reason}", count, f"{stage.path}/quarantine.csv"


def _evaluation_failures(stage: ReportStage) -> Iterator[tuple[str, float, str]]:
    yield "questions without an answer", stage.metrics.get("missing", 0), "they count as wrong"
    file = stage.path / ANSWERS_FILE
    if stage.artifact and stage.kind == "evaluate" and file.exists():
        lines = [json.loads(line) for line in file.read_bytes().splitlines()]
        problems = [problem for line in lines if (problem := (line.get("metadata") or {}).get("problem"))]
        yield "images that could not be shown to the model", len(problems), "; ".join(problems[:3])
