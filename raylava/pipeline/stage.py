"""The interface of a stage, and how its artifact is obtained: reused, awaited from another run, or built."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from raylava.artifacts import Artifact, ArtifactSpec, lock
from raylava.console import escape
from raylava.progress import ProgressBar, ProgressReporter, format_duration
from raylava.storage import StoragePath


class Stage(ABC):
    """A node of the stage graph. `label` names it within a recipe, `unit` what its progress counts.

    `inputs` maps roles (blocks, connector, model) to the artifacts that it reads.
    """

    unit: ClassVar[str]

    def __init__(self, kind: str, label: str, storage: StoragePath, inputs: Mapping[str, ArtifactSpec]) -> None:
        self.kind, self.label, self.storage, self.inputs = kind, label, storage, dict(inputs)

    def spec(self) -> ArtifactSpec:
        """Return the artifact that the stage produces. Raises UserError when an input cannot be identified."""
        return self._spec

    @cached_property
    def _spec(self) -> ArtifactSpec:
        return ArtifactSpec(self.kind, self.fingerprint_fields(), self.storage)

    @abstractmethod
    def fingerprint_fields(self) -> dict[str, Any]:
        """Return everything that determines the artifact's content, as JSON-serializable values."""

    @abstractmethod
    def run(self, progress: ProgressBar) -> dict[str, Any]:
        """Write the artifact's content to `spec().path`; return its metrics."""

    def verify(self, metrics: Mapping[str, Any]) -> None:  # noqa: B027 (optional: most stages accept any metrics)
        """Check the metrics of an existing artifact against the recipe. Raises UserError."""


def run_stage(stage: Stage, reporter: ProgressReporter) -> Artifact:
    """Return the stage's artifact, building it unless it exists. Of two runs, one builds and the other waits."""
    if artifact := stage.spec().find():
        return reuse(stage, artifact, reporter)
    with lock(stage.spec().path, stage.label):
        if artifact := stage.spec().find():  # another run completed it while this one waited
            return reuse(stage, artifact, reporter)
        started = time.monotonic()
        with reporter.stage(stage.label, stage.unit) as progress:
            metrics = stage.run(progress)
        return commit(stage, metrics, started, reporter)


def commit(stage: Stage, metrics: dict[str, Any], started: float, reporter: ProgressReporter) -> Artifact:
    """Mark the built artifact as complete. `started` is a value of time.monotonic()."""
    inputs = {role: spec.fingerprint for role, spec in stage.inputs.items()}
    artifact = stage.spec().commit(metrics, inputs, time.monotonic() - started)
    path, seconds = escape(str(artifact.path)), artifact.record["seconds"]
    reporter.say(f"[green]✓[/] {stage.label:<28} built in {format_duration(seconds)}  [dim]{path}[/]")
    return artifact


def reuse(stage: Stage, artifact: Artifact, reporter: ProgressReporter) -> Artifact:
    """Return the stage's existing artifact. Raises UserError when it does not pass the stage's verification."""
    stage.verify(artifact.metrics)
    reporter.say(f"[green]✓[/] {stage.label:<28} reused            [dim]{escape(str(artifact.path))}[/]")
    return artifact
