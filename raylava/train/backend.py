"""What a rank stands on: Ray Train (worker.py), or nothing but its processes (alone.py). The loop knows no more."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from raylava.storage import StoragePath

if TYPE_CHECKING:
    import torch

    from raylava.train.metrics import StepMetrics

Upload = Callable[[Path, StoragePath], None]
LOADING, COMPUTING, SAVING = "waiting for data", "computing", "saving"  # what a rank may be doing


@dataclass(frozen=True)
class CheckpointRef:
    """A whole checkpoint: all ranks' files in a folder of this node, and where it is kept."""

    folder: Path
    uri: str


class TrainBackend(Protocol):
    """One rank's surroundings. torch.distributed is set up before the loop starts."""

    rank: int
    world_size: int
    device: "torch.device"

    def last_checkpoint(self) -> AbstractContextManager[CheckpointRef | None]:
        """The run's last whole checkpoint, on this node for as long as the context lasts; None before the first."""

    def save_async(self, folder: Path, cursor: int, loss: float, upload: Upload) -> None:
        """Bring this rank's part of a checkpoint to storage, in the background, by `upload`; then remove the folder.

        `loss` is the mean since the checkpoint before, by which the best are kept. Called by all ranks.
        """

    def preemption_pending(self) -> bool:
        """Whether a node of the run was told that it will be taken away. Called by all ranks: one answer for all."""

    def heartbeat(self, step: int, doing: str) -> None:
        """This rank sets out to do one of the above in a step."""

    def report(self, metrics: "StepMetrics", steps: int) -> None:
        """A step of `steps` is done. Called by rank 0."""
