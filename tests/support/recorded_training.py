"""A training stage in this process: the product's Trainer with a backend that records its calls."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from raylava.errors import RunError
from raylava.perf.memory import ExecutionConfig
from raylava.storage import storage_path
from raylava.train.backend import CheckpointRef, Upload
from raylava.train.metrics import StepMetrics
from raylava.train.spec import TrainSpec
from raylava.train.step_log import MECHANISMS
from raylava.train.trainer import Trainer

NO_CACHE_LIMIT = 1e12


class RecordingBackend:
    """The backend of a single rank that saves no checkpoint but records when one would be saved."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self) -> None:
        self.saved_steps: list[int] = []
        self.metrics: list[StepMetrics] = []
        self.lines: list[str] = []
        self.rejected: list[ExecutionConfig] = []

    @contextmanager
    def last_checkpoint(self) -> Iterator[CheckpointRef | None]:
        yield None

    @contextmanager
    def best_checkpoint(self) -> Iterator[tuple[CheckpointRef, float] | None]:
        yield None

    def save_async(self, folder: Path, step: int, loss: float, upload: Upload) -> None:
        self.saved_steps.append(step)

    def preemption_pending(self) -> bool:
        return False

    def heartbeat(self, step: int, phase: str) -> None:
        """Do nothing."""

    def report(self, metrics: StepMetrics, steps: int) -> None:
        self.metrics.append(metrics)

    def reject(self, config: ExecutionConfig) -> None:
        self.rejected.append(config)

    def announce(self, lines: Sequence[str]) -> None:
        self.lines += lines


def build_trainer(spec: TrainSpec) -> tuple[Trainer, RecordingBackend]:
    """Return the stage's trainer; torch.distributed must be initialized with one rank."""
    backend = RecordingBackend()
    return Trainer(spec, backend, NO_CACHE_LIMIT), backend


def record_training(spec: TrainSpec) -> dict[str, Any]:
    """Train the stage; return what determines its result and what is in force, without times and memory."""
    trainer, backend = build_trainer(spec)
    try:
        trainer.run()
    except RunError as error:
        return {"error": str(error).partition(";")[0]}
    steps = [(metrics.step, metrics.loss, metrics.lr, metrics.grad_norm) for metrics in backend.metrics]
    output = storage_path(spec.output)
    return {
        "steps": steps,
        "step log": [_without_times(line) for line in (output / "steps.jsonl").read_bytes().splitlines()],
        "saved": backend.saved_steps,
        "mechanisms": json.loads((output / MECHANISMS).read_bytes()),
        "lines": backend.lines,
    }


def _without_times(line: bytes) -> dict[str, Any]:
    return {name: value for name, value in json.loads(line).items() if name != "time"}
