"""A training stage without Ray: this process is a rank by itself, or one of those that torchrun started.

Checkpoints lie in the same folder of the spec as under Ray Train, but neither reads the other's: Ray keeps a list of
its own. Told to stop (SIGTERM), a run saves first.
"""

import contextlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raylava.config.recipe import CheckpointConfig, Resources
from raylava.console import ProgressBar
from raylava.errors import RunError
from raylava.storage import StoragePath, storage_path
from raylava.train.backend import CheckpointRef, Upload
from raylava.train.engine import read_checkpoint_meta
from raylava.train.metrics import StepMetrics
from raylava.train.metrics_logger import summary
from raylava.train.spec import CHECKPOINTS, TrainSpec
from raylava.train.trainer import Trainer

_DONE = "done-rank-{}.json"  # written after all else of a rank's part


@dataclass(frozen=True)
class RankInfo:
    """This process among those of the run."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> "RankInfo":
        """As torchrun says; one rank where it says nothing."""
        return cls(
            *(int(os.environ.get(name, plain)) for name, plain in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        )


def train(spec: TrainSpec, resources: Resources, bar: ProgressBar) -> dict[str, Any] | None:
    """Run the stage on all ranks, from its last checkpoint if it has one. Returns the metrics on rank 0.

    Raises RunError, on every rank, when the run was told to stop; what it had done is saved then.
    """
    ranks = RankInfo.from_environment()
    torch.set_num_threads(resources.cpus_per_worker)
    with _process_group(ranks) as device:
        host = _TorchrunBackend(spec, ranks, device, bar)
        Trainer(spec, host, 1e9 * resources.cache_gb).run()
        host.finish()
        return summary(storage_path(spec.output)) if ranks.rank == 0 else None


@contextmanager
def _process_group(ranks: RankInfo) -> Iterator[torch.device]:
    device = torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # DeepSpeed asks for it
    backend = "nccl" if device.type == "cuda" else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield device
    finally:
        dist.destroy_process_group()


class _TorchrunBackend:
    """A Host (host.py) of its own means: a thread uploads, rank 0 shows a bar, SIGTERM is the notice."""

    def __init__(self, spec: TrainSpec, ranks: RankInfo, device: torch.device, bar: ProgressBar) -> None:
        self.rank, self.world_size, self.device = ranks.rank, ranks.world_size, device
        self._settings, self._folder, self._bar = spec.training.checkpoint, storage_path(spec.output) / CHECKPOINTS, bar
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._uploading: Future[None] | None = None
        self._told = False
        signal.signal(signal.SIGTERM, self._tell)

    def _tell(self, *_: Any) -> None:
        self._told = True

    @contextmanager
    def last_checkpoint(self) -> Iterator[CheckpointRef | None]:
        """Rank 0 chooses, so that all take the same."""
        whole = _whole(self._folder) if self.rank == 0 else []
        chosen = [whole[-1].name if whole else None]
        dist.broadcast_object_list(chosen, device=self.device)
        if chosen[0] is None:
            yield None
            return
        source = self._folder / chosen[0]
        if source.is_local:
            yield CheckpointRef(Path(source.path), source.uri)
            return
        with tempfile.TemporaryDirectory(prefix="raylava-checkpoint-") as folder:
            source.copy_to(Path(folder))
            yield CheckpointRef(Path(folder), source.uri)

    def save_async(self, folder: Path, cursor: int, loss: float, upload: Upload) -> None:
        self._wait()
        target = self._folder / f"step-{cursor:08d}"
        self._uploading = self._thread.submit(self._bring, folder, target, loss, upload)
        if self._told:
            self._wait()
            raise RunError(
                f"told to stop; step {cursor} and all before it are saved, the same command goes on from there"
            )

    def _bring(self, folder: Path, target: StoragePath, loss: float, upload: Upload) -> None:
        with contextlib.suppress(FileNotFoundError):
            (target / _DONE.format(self.rank)).delete()  # of an earlier attempt at the same step
        upload(folder, target)
        (target / _DONE.format(self.rank)).write_bytes(json.dumps({"loss": loss}).encode())
        shutil.rmtree(folder)
        if self.rank == 0:
            for one in expired_checkpoints(_whole(self._folder), self._settings):
                one.delete()

    def _wait(self) -> None:
        if self._uploading is not None:
            self._uploading.result()

    def preemption_pending(self) -> bool:
        told = torch.tensor([float(self._told)], device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        self._told = bool(told.item())
        return self._told

    def heartbeat(self, step: int, doing: str) -> None:
        """Nobody watches but the person at the bar."""

    def report(self, metrics: StepMetrics, steps: int) -> None:
        self._bar.update(metrics.step + 1, steps, **metrics.shown())

    def finish(self) -> None:
        """The result is written: no checkpoint is needed any more."""
        self._wait()
        dist.barrier()
        if self.rank == 0:
            self._folder.delete()


def _whole(folder: StoragePath) -> list[StoragePath]:
    """The checkpoints that all ranks have finished, oldest first."""
    return [one for one in folder.children() if _is_whole(one)]


def _is_whole(checkpoint: StoragePath) -> bool:
    try:
        world_size = read_checkpoint_meta(checkpoint).world_size
    except FileNotFoundError:
        return False
    return all((checkpoint / _DONE.format(rank)).exists() for rank in range(world_size))


def expired_checkpoints(whole: list[StoragePath], settings: CheckpointConfig) -> list[StoragePath]:
    """Of whole checkpoints, oldest first, those that need not be kept: the newest always is, and the best or the
    newest others up to `settings.keep_latest`.
    """
    newest, older = whole[-1:], whole[:-1]
    if settings.keep_best:
        older = sorted(older, key=lambda one: -json.loads((one / _DONE.format(0)).read_bytes())["loss"])
    spared = settings.keep_latest - len(newest)
    return older[: max(0, len(older) - spared)]
