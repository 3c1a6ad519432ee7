"""All figures of a report as one JSON-serializable dict; the page only renders it."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Any

import yaml

from raylava import __version__
from raylava.artifacts import fingerprint
from raylava.config.recipe import Recipe, Resources
from raylava.errors import redact_urls
from raylava.evaluation.published_scores import SOURCE
from raylava.pipeline.results import device_hours_per_second
from raylava.pipeline.run_report.corpora import corpus_data
from raylava.pipeline.run_report.failures import stage_failures
from raylava.pipeline.run_report.gallery import MAX_QUESTIONS, gallery_data
from raylava.pipeline.run_report.scores import MODEL, benchmark_data, benchmark_names, evaluations_of
from raylava.pipeline.run_report.stages import ReportStage
from raylava.pipeline.run_report.training import TRAINING_STAGES, training_data
from raylava.pipeline.status import list_artifacts
from raylava.storage import StoragePath
from raylava.train.step_log import training_seconds

_COUNTED_STAGES = (*TRAINING_STAGES, "evaluate")  # run on the recipe's workers
_LIBRARIES = ("ray", "torch", "transformers", "deepspeed")
_FINGERPRINT_DIGITS = 8


@dataclass(frozen=True)
class ReportSubject:
    """What a report is about: the stages of a run, in an order in which each follows its inputs.

    `recipe` is None where only artifacts are known. `command` is what builds them. A stage that finished at
    `built_since` (seconds since the epoch) or later was built by the run that the report ends, an earlier one reused.
    """

    name: str
    stages: Sequence[ReportStage]
    storage: StoragePath
    command: str
    recipe: Recipe | None = None
    built_since: float | None = None

    @property
    def fingerprint(self) -> str:
        """The first digits of a fingerprint of all stages."""
        return fingerprint("report", {"stages": [stage.fingerprint for stage in self.stages]})[:_FINGERPRINT_DIGITS]


def report_data(subject: ReportSubject, images: dict[str, str] | None = None) -> dict[str, Any]:
    """Return everything that the report shows, without secrets in URLs.

    `images`, if given, receives the data URIs of the images that the data refers to by name.
    """
    images = {} if images is None else images
    stages = subject.stages
    named = {name: evaluations_of(name, stages) for name in benchmark_names(stages)}
    answered = {name: evaluations for name, evaluations in named.items() if MODEL in evaluations}
    limit = MAX_QUESTIONS // max(1, len(answered))
    benchmarks = [benchmark_data(name, evaluations) for name, evaluations in answered.items()]
    rows = _stage_rows(subject)
    data = {
        "name": subject.name,
        "fingerprint": subject.fingerprint,
        "finished": max((row["finished"] for row in rows), default=""),
        "raylava": sorted({stage.artifact.record.get("raylava", "") for stage in stages if stage.artifact}),
        "headlines": [_headline(benchmark) for benchmark in benchmarks if benchmark["scored"]],
        "stages": rows,
        "seconds": sum(row["seconds"] or 0.0 for row in rows),
        "device_hours": sum(row["device_hours"] or 0.0 for row in rows),
        "device_unit": _device_unit(subject.recipe),
        "failures": [entry for stage in stages for entry in stage_failures(stage)],
        "training": [training_data(stage) for stage in stages if stage.kind in TRAINING_STAGES],
        "corpora": [
            corpus_data(stage.label, stage.artifact, images)
            for stage in stages
            if stage.kind == "prepare" and stage.artifact
        ],
        "benchmarks": benchmarks,
        "unanswered": [name for name in named if name not in answered],
        "published_source": SOURCE,
        "gallery_limit": MAX_QUESTIONS,
        "galleries": [gallery_data(name, evaluations, limit, images) for name, evaluations in answered.items()],
        "reproduce": _reproduce(subject),
    }
    return _redact(data)


def _headline(benchmark: dict[str, Any]) -> dict[str, Any]:
    first = benchmark["scores"][0]
    return {"benchmark": benchmark["name"], "metric": first["name"]} | {key: first[key] for key in _INTERVAL}


_INTERVAL = ("value", "low", "high")


def _stage_rows(subject: ReportSubject) -> list[dict[str, Any]]:
    labels = {stage.fingerprint: stage.label for stage in subject.stages}
    missing = {stage.fingerprint for stage in subject.stages if stage.artifact is None}
    unfinished = {}
    if missing:
        unfinished = {status.fingerprint: status for status in list_artifacts(subject.storage, missing)}
    rows = []
    for stage in subject.stages:
        status = unfinished.get(stage.fingerprint)
        seconds = _seconds(stage)
        rows.append(
            {
                "label": stage.label,
                "kind": stage.kind,
                "fingerprint": stage.fingerprint,
                "state": _state(stage, subject.built_since)
                if stage.artifact
                else status.state
                if status
                else "not built",
                "detail": status.detail if status else "",
                "seconds": seconds,
                "device_hours": _device_hours(stage, seconds, subject.recipe),
                "finished": stage.artifact.record["finished"] if stage.artifact else "",
                "inputs": [labels[source] for source in stage.inputs if source in labels],
                "path": str(stage.path),
            }
        )
    return rows


def _state(stage: ReportStage, built_since: float | None) -> str:
    assert stage.artifact is not None
    if built_since is None:
        return "complete"
    finished = datetime.fromisoformat(stage.artifact.record["finished"]).timestamp()
    return "built" if finished >= int(built_since) else "reused"


def _seconds(stage: ReportStage) -> float | None:
    """Return the seconds that a stage took, of training over all attempts; None if it has not begun."""
    if stage.kind in TRAINING_STAGES:
        return round(training_seconds(stage.path, stage.artifact), 1) or None
    return stage.artifact.record["seconds"] if stage.artifact else None


def _device_hours(stage: ReportStage, seconds: float | None, recipe: Recipe | None) -> float | None:
    """Return the device-hours of a stage that occupies the recipe's workers; None for others, or without a recipe."""
    if recipe is None or seconds is None or stage.kind not in _COUNTED_STAGES:
        return None
    return device_hours_per_second(recipe.resources) * seconds


def _device_unit(recipe: Recipe | None) -> str:
    resources = recipe.resources if recipe else Resources()
    return "GPU-hours" if resources.gpus_per_worker else "CPU-core-hours"


def _reproduce(subject: ReportSubject) -> dict[str, Any]:
    settings: dict[str, Any] = (
        subject.recipe.model_dump(mode="json")
        if subject.recipe
        else {stage.label: stage.artifact.record["fingerprint_fields"] for stage in subject.stages if stage.artifact}
    )
    versions = {"raylava": __version__, "python": platform.python_version()}
    return {
        "command": subject.command,
        "title": "Recipe" if subject.recipe else "Settings recorded in the artifacts",
        "settings": yaml.safe_dump(_redact(settings), sort_keys=False, allow_unicode=True, width=1000),
        "versions": versions | {name: version(name) for name in _LIBRARIES},
    }


def _redact(value: Any) -> Any:
    """Return a JSON value with secrets in the URLs of its texts replaced."""
    if isinstance(value, str):
        return redact_urls(value)
    if isinstance(value, dict):
        return {key: _redact(item) for key, item in value.items()}
    return [_redact(item) for item in value] if isinstance(value, (list, tuple)) else value
