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

from raylava.gauges import Gauges
from raylava.storage import place
from raylava.train.host import COMPUTING, LOADING, KeptCheckpoint, Upload
from raylava.train.job import CHECKPOINTS, TrainJob

if TYPE_CHECKING:
    from raylava.train.figures import StepFigures


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's loop function. `config` holds the TrainJob, the watch of its progress, CPU threads, cache bytes."""
    from raylava.train.loop import Loop  # not in Ray's controller, which hands this on: a stage starts seconds sooner

    torch.set_num_threads(config["threads"])
    Loop(config["job"], _RayHost(config["job"], config["watch"]), config["cache_bytes"]).run()


class _RayHost:
    """A Host (host.py): checkpoints by Ray Train, beats and figures to the driver's Watch, gauges to Ray's metrics."""

    def __init__(self, job: TrainJob, watch: Any) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._checkpoints, self._watch = place(job.output) / CHECKPOINTS, watch
        self._gauges = Gauges(place(job.output).name, job.stage, self.rank)
        self._started = self._loading = time.monotonic()

    @contextmanager
    def last_checkpoint(self) -> Iterator[KeptCheckpoint | None]:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield KeptCheckpoint(Path(folder), checkpoint.path)

    def hand_over(self, folder: Path, cursor: int, loss: float, upload: Upload) -> None:
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

    def node_is_going(self) -> bool:
        return ray.train.get_preemption_info() is not None

    def beat(self, step: int, doing: str) -> None:
        self._watch.beat.remote(self.rank, step, doing)
        if doing == LOADING:
            self._loading = time.monotonic()
        elif doing == COMPUTING:
            self._gauges.set(data_wait_seconds=time.monotonic() - self._loading)

    def show(self, figures: "StepFigures", steps: int) -> None:
        self._watch.update.remote(figures.step + 1, steps, **figures.shown())
        self._gauges.set(**asdict(figures))
        self._gauges.set(worker_seconds=self.world_size * (time.monotonic() - self._started))
