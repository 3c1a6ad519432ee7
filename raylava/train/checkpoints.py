"""When a run saves, and what goes into a checkpoint: all ranks at the same step, uploaded while training goes on."""

import logging
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from raylava.storage import StoragePath
from raylava.train.backend import TrainBackend
from raylava.train.engine import Engine, StepResult
from raylava.train.spec import TrainSpec
from raylava.train.step_log import STEP_LOG, StepLog
from raylava.train.upload import upload

logger = logging.getLogger(__name__)

_GO_ON, _SAVE, _ASK = range(3)  # what rank 0 decides after a step
_ASK_SECONDS = 5.0  # how often ranks ask whether a node is about to go


class CheckpointManager:
    """One rank's checkpoints of one run."""

    def __init__(self, spec: TrainSpec, steps: int, backend: TrainBackend) -> None:
        self._settings, self._steps, self._backend = spec.training.checkpoint, steps, backend
        self._last_time, self._last_step = time.monotonic(), 0
        self._asked = time.monotonic()
        self._warned = False  # of a node about to go
        self._saved = 0
        self._losses: list[float] = []
        self._last_good = "none"

    def resumed(self, checkpoint: str, step: int) -> None:
        """The run goes on from this one, which holds the state before `step`."""
        self._last_good, self._saved, self._last_step = checkpoint, 1, step

    def record_loss(self, result: StepResult) -> None:
        """A step's loss, for the mean by which the best checkpoints are kept."""
        if not result.skipped:
            self._losses.append(result.loss)

    def should_save(self, cursor: int) -> bool:
        """Whether to save before step `cursor`. Rank 0 decides by its clock, so that all ranks agree."""
        if cursor >= self._steps:
            return False
        answer = self._agreed(self._decide(cursor))
        if answer != _ASK:
            return answer == _SAVE
        self._asked = time.monotonic()
        return self._node_is_going()

    def _decide(self, cursor: int) -> int:
        settings = self._settings
        late = time.monotonic() - self._last_time >= settings.interval_minutes * 60
        if settings.interval_steps is not None and cursor - self._last_step >= settings.interval_steps:
            late = True
        if not self._saved and 2 * cursor >= self._steps:
            late = True
        if late:
            return _SAVE
        return _ASK if time.monotonic() - self._asked >= _ASK_SECONDS else _GO_ON

    def _agreed(self, verdict: int) -> int:
        if self._backend.world_size == 1:
            return verdict
        shared = torch.tensor([verdict], device=self._backend.device)
        torch.distributed.broadcast(shared, src=0)
        return int(shared.item())

    def _node_is_going(self) -> bool:
        """A notice for a node of this run, the first time it is heard; the run starts anew once the node is gone."""
        if self._warned or not self._backend.preemption_pending():
            return False
        self._warned = True
        logger.warning("a node of this run is about to go: saving at once")
        return True

    def save(self, engine: Engine, ledger: StepLog, cursor: int) -> float:
        """Save the state before step `cursor`; returns the seconds that training stood still for it."""
        started = time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix="raylava-checkpoint-"))  # the host removes it once it is uploaded
        engine.save(folder, cursor)
        if self._backend.rank == 0:
            (folder / STEP_LOG).write_text(ledger.text())
        loss = sum(self._losses) / len(self._losses) if self._losses else math.inf
        self._backend.save_async(folder, cursor, loss, self._uploader(engine))
        self._last_time, self._last_step, self._losses = time.monotonic(), cursor, []
        self._saved += 1
        return time.monotonic() - started

    def _uploader(self, engine: Engine) -> Callable[[Path, StoragePath], None]:
        def uploaded(folder: Path, target: StoragePath) -> None:
            engine.wait_for_save()
            upload(folder, target, self._settings.upload_timeout_minutes * 60, lambda: self._last_good)
            self._last_good = str(target)

        return uploaded
