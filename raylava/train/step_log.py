"""steps.jsonl: what was done in each step, and the proof that a resumed run did the same."""

import hashlib
import json
import math
import time

import numpy as np

from raylava.train.data_loader import StepBatch
from raylava.train.engine import StepResult

STEP_LOG = "steps.jsonl"


class StepLog:
    """A run's steps as JSON lines; rank 0 keeps it, in every checkpoint and with the result."""

    def __init__(self, text: str = "") -> None:
        self._lines = text.splitlines()

    def add(self, work: StepBatch, result: StepResult, world_size: int) -> None:
        """One step. `samples_sha256` is of the samples' numbers in the plan's order, as little-endian int64."""
        samples = np.ascontiguousarray(work.step.samples, dtype="<i8")
        entry = {
            "step": work.step.number,
            "epoch": work.step.epoch,
            "samples": len(samples),
            "samples_sha256": hashlib.sha256(samples.tobytes()).hexdigest()[:16],
            "loss": result.loss if math.isfinite(result.loss) else None,
            "skipped": result.skipped,
            "tokens": work.tokens,
            "loss_tokens": work.loss_tokens,
            "world_size": world_size,
            "time": round(time.time(), 3),
        }
        self._lines.append(json.dumps(entry))

    def text(self) -> str:
        """The file's content."""
        return "".join(line + "\n" for line in self._lines)
