"""The backend interface of the Trainer, implemented by ray/worker.py and torchrun_backend.py."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from raylava.perf.memory import ExecutionConfig
from raylava.storage import StoragePath

if TYPE_CHECKING:
    import torch

    from raylava.train.metrics import StepMetrics

Upload = Callable[[Path, StoragePath], None]
# The phases that a rank reports, in their order within a run and a step.
STARTING, LOADING, COMPUTING, SAVING = "loading the model", "waiting for data", "computing", "saving"
PUBLISHING = "writing the result"


@dataclass(frozen=True)
class CheckpointRef:
    """A complete checkpoint: `folder` holds the files of all ranks on this node, `uri` is its location in storage."""

    folder: Path
    uri: str


class TrainBackend(Protocol):
    """The environment of one rank. torch.distributed is initialized before the Trainer starts."""

    rank: int
    world_size: int
    device: "torch.device"

    def last_checkpoint(self) -> AbstractContextManager[CheckpointRef | None]:
        """Provide the run's latest complete checkpoint on this node; None before the first."""

    def save_async(self, folder: Path, step: int, loss: float, upload: Upload) -> None:
        """Upload this rank's part of a checkpoint in the background with `upload`, then remove the folder.

        `loss` is the mean since the previous checkpoint, by which the best are selected. All ranks call it.
        """

    def best_checkpoint(self) -> "AbstractContextManager[tuple[CheckpointRef, float] | None]":
        """Provide the complete checkpoint with the lowest loss, and that loss; None if there is none.

        All ranks call it after the last step; only rank 0 gets a checkpoint.
        """

    def preemption_pending(self) -> bool:
        """Return whether a node of the run received a preemption notice. All ranks call it and get the same answer."""

    def heartbeat(self, step: int, phase: str) -> None:
        """Report that this rank enters a phase of a step."""

    def report(self, metrics: "StepMetrics", steps: int) -> None:
        """Report the metrics of a completed step of `steps`. Only rank 0 calls it."""

    def reject(self, config: ExecutionConfig) -> None:
        """Note that the memory dry run of this configuration failed, and that the recipe allows a smaller one."""

    def announce(self, lines: Sequence[str]) -> None:
        """Log lines about the run before its first step. Only rank 0 calls it."""
