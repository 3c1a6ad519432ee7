"""One Ray Train worker: the loop's host as Ray gives it. With trainer.py, the only room where training meets Ray."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode

from raylava.cluster.gauges import Gauges
from raylava.storage import storage_path
from raylava.train.backend import COMPUTING, LOADING, CheckpointRef, Upload
from raylava.train.spec import CHECKPOINTS, TrainSpec

if TYPE_CHECKING:
    from raylava.train.metrics import StepMetrics


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Ray Train's loop function. `config` holds the TrainSpec, the watch of its progress, CPU threads, cache bytes."""
    from raylava.train.trainer import (
        Trainer,
    )  # not in Ray's controller, which hands this on: a stage starts seconds sooner

    torch.set_num_threads(config["threads"])
    Trainer(config["spec"], _RayBackend(config["spec"], config["watch"]), config["cache_bytes"]).run()


class _RayBackend:
    """A Host (host.py): checkpoints by Ray Train, heartbeats and metrics to the driver's Watch, gauges to Ray's metrics."""

    def __init__(self, spec: TrainSpec, watch: Any) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._checkpoints, self._watch = storage_path(spec.output) / CHECKPOINTS, watch
        self._gauges = Gauges(storage_path(spec.output).name, spec.stage, self.rank)
        self._started = self._loading = time.monotonic()

    @contextmanager
    def last_checkpoint(self) -> Iterator[CheckpointRef | None]:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield CheckpointRef(Path(folder), checkpoint.path)

    def save_async(self, folder: Path, cursor: int, loss: float, upload: Upload) -> None:
        name = f"step-{cursor:08d}"
        target = self._checkpoints / name

        def uploaded(local: Checkpoint, _: str) -> Checkpoint:
            upload(Path(local.path), target)
            self._gauges.set(checkpoint_time_seconds=time.time())
            return Checkpoint(path=target.path, filesystem=target.filesystem)

        ray.train.report(
            {"step": cursor, "loss": loss},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=uploaded,
        )

    def preemption_pending(self) -> bool:
        return ray.train.get_preemption_info() is not None

    def heartbeat(self, step: int, doing: str) -> None:
        self._watch.heartbeat.remote(self.rank, step, doing)
        if doing == LOADING:
            self._loading = time.monotonic()
        elif doing == COMPUTING:
            self._gauges.set(data_wait_seconds=time.monotonic() - self._loading)

    def report(self, metrics: "StepMetrics", steps: int) -> None:
        self._watch.update.remote(metrics.step + 1, steps, **metrics.shown())
        self._gauges.set(**asdict(metrics))
        self._gauges.set(worker_seconds=self.world_size * (time.monotonic() - self._started))
