"""What a stage is, and how its artifact gets made: found, waited for, or built. Which there are is stages.py's."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylava.artifacts import Artifact, Draft, lock
from raylava.console import Bar, Shows

if TYPE_CHECKING:
    from raylava.train.job import TrainJob


@dataclass(frozen=True)
class Stage:
    """One node of the graph: what makes its artifact, from which others. `label` names it among the recipe's stages."""

    label: str
    draft: Draft
    inputs: dict[str, Draft]
    unit: str
    build: Callable[[Bar], dict[str, Any]]
    verify: Callable[[dict[str, Any]], None] = lambda metrics: None
    job: "Callable[[], TrainJob] | None" = None  # of a training stage


def make(stage: Stage, console: Shows) -> Artifact:
    """The stage's artifact, built unless it is there. Two runs at once: one builds, the other waits for it."""
    if stage.draft.find() is not None:
        return found(stage, console)
    with lock(stage.draft.place, stage.label):
        if stage.draft.find() is not None:  # another run finished it while we waited
            return found(stage, console)
        started = time.monotonic()
        with console.stage(stage.label, stage.unit) as bar:
            metrics = stage.build(bar)
        return committed(stage, metrics, started, console)


def committed(stage: Stage, metrics: dict[str, Any], started: float, console: Shows) -> Artifact:
    """Declare what was built complete. `started` is of time.monotonic()."""
    inputs = {role: draft.fingerprint for role, draft in stage.inputs.items()}
    artifact = stage.draft.commit(metrics, inputs, time.monotonic() - started)
    console.say(f"[green]✓[/] {stage.label:<28} made in {artifact.record['seconds']:.0f} s  [dim]{artifact.place}[/]")
    return artifact


def found(stage: Stage, console: Shows) -> Artifact:
    """The artifact, which is there. Raises what the stage's own check of it raises."""
    artifact = stage.draft.find()
    assert artifact is not None
    stage.verify(artifact.metrics)
    console.say(f"[green]✓[/] {stage.label:<28} found             [dim]{artifact.place}[/]")
    return artifact
