"""Checkpoints of a run: when they are saved, what they contain, their upload with retries, and their conversion.

All ranks save at the same step; the upload runs in the background while training continues.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from raylava.config.recipe import Training
from raylava.errors import RunError, first_line
from raylava.storage import StoragePath, retry, storage_path
from raylava.train.backend import TrainBackend
from raylava.train.spec import TrainSpec
from raylava.train.step_log import STEP_LOG, StepLog

if TYPE_CHECKING:
    from raylava.train.engine import Engine, StepResult

logger = logging.getLogger(__name__)

CONTINUE, SAVE, CHECK_PREEMPTION = range(3)  # rank 0's request after a step
_PREEMPTION_CHECK_INTERVAL_S = 5.0
CHECKPOINT_TAG = "state"  # one checkpoint folder holds one DeepSpeed tag
_META_FILE = "checkpoint.json"


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint holds: the state before `step`, saved by `world_size` ranks at `zero_stage`."""

    step: int
    world_size: int
    zero_stage: int


def read_checkpoint_meta(checkpoint: StoragePath) -> CheckpointMeta:
    """Read a checkpoint's metadata. Raises FileNotFoundError where there is none."""
    return CheckpointMeta(**json.loads((checkpoint / _META_FILE).read_bytes()))


def write_checkpoint_meta(folder: Path, step: int, world_size: int, zero_stage: int) -> None:
    """Write a checkpoint's metadata."""
    (folder / _META_FILE).write_text(json.dumps(asdict(CheckpointMeta(step, world_size, zero_stage))))


def loadable_meta(checkpoint: Path, training: Training) -> CheckpointMeta:
    """Return the metadata of a checkpoint. Raises RunError where it is of another ZeRO stage."""
    meta = read_checkpoint_meta(storage_path(checkpoint))
    if meta.zero_stage != training.zero.stage:
        raise RunError(
            f"{checkpoint} was saved with zero.stage={meta.zero_stage} and this run has "
            f"zero.stage={training.zero.stage}; keep the stage until the run is done"
        )
    return meta


class CheckpointManager:
    """Decides when one run saves a checkpoint, and saves it. Every rank has one and calls it after each step."""

    def __init__(self, spec: TrainSpec, steps: int, backend: TrainBackend) -> None:
        self._config, self._steps, self._backend = spec.training.checkpoint, steps, backend
        self._saved_at, self._saved_step = time.monotonic(), 0
        self._preemption_checked_at = time.monotonic()
        self._preemption_handled = False
        self._checkpoints = 0
        self._losses: list[float] = []
        self._last_uploaded = "none"

    def description(self) -> str:
        """Describe when checkpoints are saved and how many are kept."""
        config = self._config
        steps = f" or {config.interval_steps} steps" if config.interval_steps else ""
        kept = "the best" if config.keep_best else "the latest"
        return f"every {config.interval_minutes:g} minutes{steps}, keeps {kept} {config.keep_latest}"

    def resume_from(self, checkpoint: str, step: int) -> None:
        """Record the checkpoint that the run continues from, which holds the state before `step`."""
        self._last_uploaded, self._checkpoints, self._saved_step = checkpoint, 1, step

    def record_loss(self, result: "StepResult") -> None:
        """Record a step's loss for the mean by which the best checkpoints are selected."""
        if not result.skipped:
            self._losses.append(result.loss)

    def request(self, next_step: int) -> int:
        """Return what to do before `next_step`: rank 0 decides by its clock, the others request nothing.

        Engine.step adds the ranks' requests up, and `should_save` interprets the sum.
        """
        if self._backend.rank != 0 or next_step >= self._steps:
            return CONTINUE
        now, config = time.monotonic(), self._config
        due = now - self._saved_at >= config.interval_minutes * 60
        if config.interval_steps is not None and next_step - self._saved_step >= config.interval_steps:
            due = True
        if not self._checkpoints and 2 * next_step >= self._steps:
            due = True
        if due:
            return SAVE
        return CHECK_PREEMPTION if now - self._preemption_checked_at >= _PREEMPTION_CHECK_INTERVAL_S else CONTINUE

    def should_save(self, request: int) -> bool:
        """Return whether to save now, given rank 0's request. All ranks call it and get the same answer."""
        if request != CHECK_PREEMPTION:
            return request == SAVE
        self._preemption_checked_at = time.monotonic()
        return self._preemption_notice_received()

    def _preemption_notice_received(self) -> bool:
        """Return True once, at the first preemption notice. Ray restarts the run when the node is gone."""
        if self._preemption_handled or not self._backend.preemption_pending():
            return False
        self._preemption_handled = True
        logger.warning("preemption notice received; saving a checkpoint")
        return True

    def mean_loss(self) -> float:
        """Return the mean loss since the last checkpoint, infinity if no step has been taken."""
        return sum(self._losses) / len(self._losses) if self._losses else math.inf

    def save(self, engine: "Engine", step_log: StepLog, next_step: int) -> float:
        """Save the state before `next_step`; return the seconds that training stood still."""
        started = time.monotonic()
        folder = self._write(engine, step_log, next_step)  # the backend removes it after the upload
        self._backend.save_async(folder, next_step, self.mean_loss(), self._uploader(engine))
        self._saved_at, self._saved_step, self._losses = time.monotonic(), next_step, []
        self._checkpoints += 1
        return time.monotonic() - started

    def keep_final(self, engine: "Engine", step_log: StepLog, target: StoragePath) -> None:
        """Save the state after the last step to `target`, for longer runs to continue from. Every rank calls it."""
        if self._backend.rank == 0:
            target.delete()  # of an attempt that failed later, perhaps with more ranks
        dist.barrier()
        folder = self._write(engine, step_log, self._steps)
        try:
            self._uploader(engine)(folder, target)
        finally:
            shutil.rmtree(folder)

    def _write(self, engine: "Engine", step_log: StepLog, next_step: int) -> Path:
        """Start writing the state before `next_step` to a temporary folder, which is returned."""
        folder = Path(tempfile.mkdtemp(prefix="raylava-checkpoint-"))
        engine.save(folder, next_step)
        if self._backend.rank == 0:
            (folder / STEP_LOG).write_text(step_log.text())
        return folder

    def _uploader(self, engine: "Engine") -> Callable[[Path, StoragePath], None]:
        def wait_and_upload(folder: Path, target: StoragePath) -> None:
            engine.wait_for_save()
            upload_checkpoint(folder, target, self._config.upload_timeout_minutes * 60, lambda: self._last_uploaded)
            self._last_uploaded = str(target)

        return wait_and_upload


def upload_checkpoint(folder: Path, target: StoragePath, timeout_s: float, last_uploaded: Callable[[], str]) -> None:
    """Copy `folder` to `target`, retrying failures for `timeout_s` seconds.

    Raises RunError after that, naming the last failure and the checkpoint that was uploaded last.
    """
    try:
        retry(lambda: target.upload_folder(folder), timeout_s, f"writing {target}")
    except OSError as error:
        raise RunError(
            f"a checkpoint could not be written to {target} for {timeout_s:.0f} s ({first_line(error)[:200]}); "
            f"the last good checkpoint is {last_uploaded()}; "
            "once storage works, re-run the same command to resume from it"
        ) from error


def checkpoint_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the trained weights of a complete checkpoint to the host, by LlavaForConditionalGeneration's names.

    At stages 1 to 3 they are put together from the fp32 partitions of all ranks.
    """
    if read_checkpoint_meta(storage_path(folder)).zero_stage >= 1:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        weights = get_fp32_state_dict_from_zero_checkpoint(folder, tag=CHECKPOINT_TAG, exclude_frozen_parameters=True)
    else:
        file = folder / CHECKPOINT_TAG / "mp_rank_00_model_states.pt"
        weights = torch.load(file, map_location="cpu", weights_only=False)["module"]
    return {name.removeprefix("llava."): value for name, value in weights.items()}


@contextmanager
def universal_checkpoint(folder: Path) -> Iterator[Path]:
    """Provide a checkpoint in DeepSpeed's universal format, which any world size can load.

    The first rank of each node converts, in a subprocess because DeepSpeed starts workers and prints. The others wait
    for a file, since a conversion may take longer than collectives wait.
    """
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"raylava-universal-{name}"
    converts, converted = int(os.environ.get("LOCAL_RANK", "0")) == 0, target.with_suffix(".done")
    if converts:
        shutil.rmtree(target, ignore_errors=True)
        converted.unlink(missing_ok=True)
    dist.barrier()  # from here on, the file is of this conversion
    if converts:
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", str(folder / CHECKPOINT_TAG), "--output_folder", str(target / CHECKPOINT_TAG)]
        conversion = subprocess.run(command, capture_output=True, text=True, check=False)
        if conversion.returncode:
            raise RunError(f"{folder}: cannot be converted to another world size: {conversion.stderr.strip()[-300:]}")
        converted.touch()
    while not converted.exists():
        time.sleep(0.05)
    yield target
    dist.barrier()
    if converts:
        shutil.rmtree(target, ignore_errors=True)
        converted.unlink()
