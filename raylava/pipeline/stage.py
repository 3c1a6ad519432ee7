"""What a stage is, and how its artifact gets made: found, waited for, or built. Which there are is stages.py's."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylava.artifacts import Artifact, ArtifactSpec, lock
from raylava.console import ProgressBar, ProgressReporter

if TYPE_CHECKING:
    from raylava.train.spec import TrainSpec


@dataclass(frozen=True)
class Stage:
    """One node of the graph: what makes its artifact, from which others. `label` names it among the recipe's stages."""

    label: str
    spec: ArtifactSpec
    inputs: dict[str, ArtifactSpec]
    unit: str
    build: Callable[[ProgressBar], dict[str, Any]]
    verify: Callable[[dict[str, Any]], None] = lambda metrics: None
    job: "Callable[[], TrainSpec] | None" = None  # of a training stage


def run_stage(stage: Stage, console: ProgressReporter) -> Artifact:
    """The stage's artifact, built unless it is there. Two runs at once: one builds, the other waits for it."""
    if stage.spec.find() is not None:
        return reuse(stage, console)
    with lock(stage.spec.path, stage.label):
        if stage.spec.find() is not None:  # another run finished it while we waited
            return reuse(stage, console)
        started = time.monotonic()
        with console.stage(stage.label, stage.unit) as bar:
            metrics = stage.build(bar)
        return commit(stage, metrics, started, console)


def commit(stage: Stage, metrics: dict[str, Any], started: float, console: ProgressReporter) -> Artifact:
    """Declare what was built complete. `started` is of time.monotonic()."""
    inputs = {role: spec.fingerprint for role, spec in stage.inputs.items()}
    artifact = stage.spec.commit(metrics, inputs, time.monotonic() - started)
    console.say(f"[green]✓[/] {stage.label:<28} made in {artifact.record['seconds']:.0f} s  [dim]{artifact.path}[/]")
    return artifact


def reuse(stage: Stage, console: ProgressReporter) -> Artifact:
    """The artifact, which is there. Raises what the stage's own check of it raises."""
    artifact = stage.spec.find()
    assert artifact is not None
    stage.verify(artifact.metrics)
    console.say(f"[green]✓[/] {stage.label:<28} found             [dim]{artifact.path}[/]")
    return artifact
