"""The files of a run: the step log steps.jsonl, which records what each step computed, and the readers of all logs.

The step log proves that a resumed run computed the same steps. metrics.jsonl beside it records how fast, which may
differ between runs. Nothing here imports torch, so that `raylava status` and `show` stay fast.
"""

import hashlib
import json
import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from raylava.artifacts import Artifact
from raylava.storage import StoragePath

if TYPE_CHECKING:
    from raylava.train.data_loader import StepBatch
    from raylava.train.engine import StepResult

STEP_LOG = "steps.jsonl"
METRICS_LOG = "metrics.jsonl"
CHECKPOINTS = "checkpoints"  # folder of a run's checkpoints within its artifact; removed once the stage is complete
FINAL_STATE = "final-state"  # the checkpoint after the last step, where a longer run of the sweep continues from it
MECHANISMS = "mechanisms.json"  # what was in force, by name, as the initialized engine reports it
SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's record of complete checkpoints, in that folder
_FINAL_LOSS_FRACTION = 20  # the final loss is the mean over the last 1/20 of the steps


class StepLog:
    """A run's steps as JSON lines. Rank 0 saves it with every checkpoint and with the result."""

    def __init__(self, text: str = "") -> None:
        self._lines = text.splitlines()

    def add(self, batch: "StepBatch", result: "StepResult", world_size: int) -> None:
        """Append a step. `samples_sha256` hashes the sample numbers in plan order, as little-endian int64."""
        samples = np.ascontiguousarray(batch.step.samples, dtype="<i8")
        entry = {
            "step": batch.step.number,
            "epoch": batch.step.epoch,
            "samples": len(samples),
            "samples_sha256": hashlib.sha256(samples.tobytes()).hexdigest()[:16],
            "loss": result.loss if math.isfinite(result.loss) else None,
            "skipped": result.skipped,
            "tokens": batch.tokens,
            "loss_tokens": batch.loss_tokens,
            "world_size": world_size,
            "time": round(time.time(), 3),
        }
        self._lines.append(json.dumps(entry))

    def text(self) -> str:
        """Return the content of the file."""
        return "".join(line + "\n" for line in self._lines)


def summarize_run(output: StoragePath) -> dict[str, Any]:
    """Return the metrics of a completed training stage, from its step log and metrics."""
    steps = [json.loads(line) for line in (output / STEP_LOG).read_bytes().splitlines()]
    metrics = [json.loads(line) for line in (output / METRICS_LOG).read_bytes().splitlines()]
    losses = [step["loss"] for step in steps if not step["skipped"]]
    final_losses = losses[-max(1, len(steps) // _FINAL_LOSS_FRACTION) :]
    durations = [_step_duration(step) for step in metrics]
    measured = {step["step"] for step in metrics}  # without those of a shorter run that this one continued
    return {
        "steps": len(steps),
        "first_step": metrics[0]["step"],  # above 0 if the run continued from a shorter one
        "skipped_steps": sum(step["skipped"] for step in steps),
        "samples": sum(step["samples"] for step in steps),
        "tokens": sum(step["tokens"] for step in steps),
        "loss_tokens": sum(step["loss_tokens"] for step in steps),
        "first_loss": losses[0],
        "final_loss": sum(final_losses) / len(final_losses),
        "tokens_per_second": sum(step["tokens"] for step in steps if step["step"] in measured) / sum(durations),
        "mechanisms": json.loads((output / MECHANISMS).read_bytes()),
        "data_wait_fraction": 1.0 - sum(step["step_time_s"] for step in metrics) / sum(durations),
    }


def training_seconds(output: StoragePath, artifact: Artifact | None) -> float:
    """Return the seconds that a training stage took over all attempts: its steps, or its last attempt if longer.

    Returns 0 where the stage left no metrics.
    """
    last_attempt = float(artifact.record["seconds"]) if artifact else 0.0
    return max(last_attempt, sum(_step_duration(step) for step in recorded_steps(output)))


def recorded_steps(output: StoragePath) -> list[dict[str, Any]]:
    """Return the metrics of each step of a training stage, complete or not; a truncated last line is left out."""
    file = output / METRICS_LOG
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_bytes().decode().splitlines(keepends=True) if line.endswith("\n")]


def _step_duration(step: dict[str, Any]) -> float:
    """Return the seconds of a step including the wait for its data."""
    return step["step_time_s"] / (1.0 - step["data_wait_fraction"])
