"""The torchrun backend: a training stage without Ray, in this process or in those that torchrun started.

Checkpoints are in the same folder of the artifact as under Ray Train, but neither backend reads the other's, since Ray
keeps its own list of them. On SIGTERM a run saves a checkpoint before it ends.
"""

import contextlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raylava.config.recipe import CheckpointConfig, Resources
from raylava.errors import RunError
from raylava.perf.memory import ExecutionConfig
from raylava.progress import ProgressBar
from raylava.storage import StoragePath, storage_path
from raylava.train.backend import CheckpointRef, Upload
from raylava.train.checkpoints import read_checkpoint_meta
from raylava.train.metrics import StepMetrics
from raylava.train.process_environment import process_environment, set_process_environment
from raylava.train.spec import TrainSpec
from raylava.train.step_log import CHECKPOINTS, summarize_run
from raylava.train.trainer import Trainer

_DECISION = "decision"  # key of the rendezvous store
_CHECKPOINT_COPIES = 2  # unchanged, and converted to another number of ranks
_NO_TIMEOUT = timedelta(days=365)
_DONE_FILE = "done-rank-{}.json"  # written after all other files of a rank


@dataclass(frozen=True)
class RankInfo:
    """The position of this process among those of the run; `node` is the number of its node."""

    rank: int
    world_size: int
    local_rank: int
    node: int = 0

    @classmethod
    def from_environment(cls) -> "RankInfo":
        """Read torchrun's variables; without them this is the only rank."""
        defaults = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("GROUP_RANK", 0))
        return cls(*(int(os.environ.get(name, default)) for name, default in defaults))


class Rendezvous:
    """The key-value store of the run's processes, which exists before their process group."""

    def __init__(self) -> None:
        self.ranks = RankInfo.from_environment()
        store = dist.HashStore()  # type: ignore[attr-defined]
        if dist.is_torchelastic_launched() or self.ranks.world_size > 1:
            store, *_ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        # torchrun keeps its store when it restarts the processes.
        self.store = dist.PrefixStore(f"raylava/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]

    def agree(self, rank_0_decides: Callable[[], bool]) -> bool:
        """Return rank 0's decision on every rank.

        The others wait for as long as it takes, as no time-out of a process group applies yet.
        """
        return self.share(_DECISION, lambda: str(int(rank_0_decides()))) == "1"

    def share(self, key: str, rank_0_computes: Callable[[], str]) -> str:
        """Return what rank 0 computes on every rank; `key` names it. Waits as `agree` does."""
        return self._share(key, self.ranks.rank == 0, rank_0_computes)

    def share_on_node(self, key: str, first_rank_computes: Callable[[], str]) -> str:
        """Return what the first rank of each node computes on every rank of that node. Waits as `agree` does."""
        return self._share(f"{key}/{self.ranks.node}", self.ranks.local_rank == 0, first_rank_computes)

    def wait_for_all(self, key: str) -> None:
        """Wait until every rank has called this with the same key, for as long as it takes."""
        self.store.set(f"{key}/{self.ranks.rank}", "")
        self.store.wait([f"{key}/{rank}" for rank in range(self.ranks.world_size)], _NO_TIMEOUT)

    def _share(self, key: str, computes_here: bool, compute: Callable[[], str]) -> str:
        if computes_here:
            self.store.set(key, compute())
        self.store.wait([key], _NO_TIMEOUT)
        text: str = self.store.get(key).decode()
        return text


def run(spec: TrainSpec, resources: Resources, progress: ProgressBar, rendezvous: Rendezvous) -> dict[str, Any] | None:
    """Train the stage on all ranks, from its latest checkpoint if there is one. Return its metrics on rank 0.

    Raises RunError on every rank after SIGTERM, once a checkpoint is saved.
    """
    ranks = rendezvous.ranks
    torch.set_num_threads(resources.cpus_per_worker)
    set_process_environment(process_environment(spec.training))
    with process_group(rendezvous, use_gpu=resources.gpus_per_worker > 0) as device:
        backend = _TorchrunBackend(spec, rendezvous, device, progress)
        Trainer(spec, backend, 1e9 * resources.cache_gb).run()
        backend.finish()
        return summarize_run(storage_path(spec.output)) if ranks.rank == 0 else None


@contextmanager
def process_group(rendezvous: Rendezvous, use_gpu: bool) -> Iterator[torch.device]:
    ranks = rendezvous.ranks
    device = torch.device("cuda", ranks.local_rank) if use_gpu else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # DeepSpeed reads it
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=rendezvous.store, rank=ranks.rank, world_size=ranks.world_size)
    try:
        yield device
    finally:
        dist.destroy_process_group()


class _TorchrunBackend:
    """A TrainBackend without Ray: a thread uploads checkpoints, rank 0 updates a progress bar, SIGTERM is the
    preemption notice.
    """

    def __init__(self, spec: TrainSpec, rendezvous: Rendezvous, device: torch.device, progress: ProgressBar) -> None:
        self._rendezvous, ranks = rendezvous, rendezvous.ranks
        self.rank, self.world_size, self.device = ranks.rank, ranks.world_size, device
        self._config, self._progress = spec.training.checkpoint, progress
        self._folder = storage_path(spec.output) / CHECKPOINTS
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._upload: Future[None] | None = None
        self._stop_requested = False
        signal.signal(signal.SIGTERM, self._request_stop)

    def _request_stop(self, *_: Any) -> None:
        self._stop_requested = True

    @contextmanager
    def last_checkpoint(self) -> Iterator[CheckpointRef | None]:
        """Provide the latest complete checkpoint. Rank 0 selects it, so that all ranks load the same.

        The first rank of each node downloads it for all of them.
        """
        selected = self._rendezvous.share("checkpoint", self._latest_checkpoint)
        if not selected:
            yield None
            return
        checkpoint = self._folder / selected
        if checkpoint.is_local:
            yield CheckpointRef(Path(checkpoint.path), checkpoint.uri)
            return
        folder = Path(self._rendezvous.share_on_node("checkpoint-folder", lambda: str(_download(checkpoint))))
        removes = self._rendezvous.ranks.local_rank == 0
        try:
            yield CheckpointRef(folder, checkpoint.uri)
            self._rendezvous.wait_for_all("checkpoint-loaded")
        finally:
            if removes:
                shutil.rmtree(folder)

    def _latest_checkpoint(self) -> str:
        complete = _complete_checkpoints(self._folder)
        return complete[-1].name if complete else ""

    @contextmanager
    def best_checkpoint(self) -> Iterator[tuple[CheckpointRef, float] | None]:
        self._wait_for_upload()
        self._rendezvous.wait_for_all("uploaded")
        complete = _complete_checkpoints(self._folder) if self.rank == 0 else []
        if not complete:
            yield None
            return
        best = min(complete, key=_recorded_loss)
        with _on_this_node(best) as checkpoint:
            yield checkpoint, _recorded_loss(best)

    def save_async(self, folder: Path, step: int, loss: float, upload: Upload) -> None:
        """Upload in the background. Raises RunError after SIGTERM, once the upload is complete."""
        self._wait_for_upload()
        target = self._folder / f"step-{step:08d}"
        self._upload = self._thread.submit(self._upload_part, folder, target, loss, upload)
        if self._stop_requested:
            self._wait_for_upload()
            raise RunError(f"stopped by SIGTERM after step {step} was saved; re-run the same command to resume")

    def _upload_part(self, folder: Path, target: StoragePath, loss: float, upload: Upload) -> None:
        with contextlib.suppress(FileNotFoundError):
            (target / _DONE_FILE.format(self.rank)).delete()  # of an earlier attempt at the same step
        upload(folder, target)
        (target / _DONE_FILE.format(self.rank)).write_bytes(json.dumps({"loss": loss}).encode())
        shutil.rmtree(folder)
        if self.rank == 0:
            for checkpoint in expired_checkpoints(_complete_checkpoints(self._folder), self._config):
                checkpoint.delete()

    def _wait_for_upload(self) -> None:
        if self._upload is not None:
            self._upload.result()

    def preemption_pending(self) -> bool:
        stop_requested = torch.tensor([float(self._stop_requested)], device=self.device)
        dist.all_reduce(stop_requested, dist.ReduceOp.MAX)
        self._stop_requested = bool(stop_requested.item())
        return self._stop_requested

    def heartbeat(self, step: int, phase: str) -> None:
        """Do nothing; no other process monitors the ranks."""

    def report(self, metrics: StepMetrics, steps: int) -> None:
        self._progress.update(metrics.step + 1, steps, **metrics.progress_metrics())

    def reject(self, config: ExecutionConfig) -> None:
        """Do nothing: the error names the settings that should fit; nothing here could start the processes again."""

    def announce(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._progress.say(line)

    def finish(self) -> None:
        """Remove the checkpoints once the result is written."""
        self._wait_for_upload()
        self._rendezvous.wait_for_all("finished")  # rank 0 may have published for longer than collectives wait
        if self.rank == 0:
            self._folder.delete()


@contextmanager
def _on_this_node(checkpoint: StoragePath) -> Iterator[CheckpointRef]:
    """Provide a checkpoint's files in a local folder, for this rank alone."""
    if checkpoint.is_local:
        yield CheckpointRef(Path(checkpoint.path), checkpoint.uri)
        return
    folder = _download(checkpoint)
    try:
        yield CheckpointRef(folder, checkpoint.uri)
    finally:
        shutil.rmtree(folder)


def _download(checkpoint: StoragePath) -> Path:
    """Copy a checkpoint to a temporary folder. Raises RunError when the disk cannot hold it and its conversion."""
    size = sum(size for _, size in checkpoint.walk_files())
    folder = Path(tempfile.mkdtemp(prefix="raylava-checkpoint-"))
    free = shutil.disk_usage(folder).free
    if free < _CHECKPOINT_COPIES * size:
        folder.rmdir()
        raise RunError(
            f"{checkpoint}: needs {_CHECKPOINT_COPIES * size / 1e9:.1f} GB in {folder.parent}, which has "
            f"{free / 1e9:.1f} GB; free space there, or set TMPDIR to another disk"
        )
    checkpoint.copy_to(folder)
    return folder


def _recorded_loss(checkpoint: StoragePath) -> float:
    return float(json.loads((checkpoint / _DONE_FILE.format(0)).read_bytes())["loss"])


def _complete_checkpoints(folder: StoragePath) -> list[StoragePath]:
    """List the checkpoints that all ranks have finished, oldest first."""
    return [checkpoint for checkpoint in folder.children() if _is_complete(checkpoint)]


def _is_complete(checkpoint: StoragePath) -> bool:
    try:
        world_size = read_checkpoint_meta(checkpoint).world_size
    except FileNotFoundError:
        return False
    return all((checkpoint / _DONE_FILE.format(rank)).exists() for rank in range(world_size))


def expired_checkpoints(complete: list[StoragePath], config: CheckpointConfig) -> list[StoragePath]:
    """Return the checkpoints to delete, given all complete ones, oldest first.

    The `config.keep_latest` newest are kept, or with `keep_best` as many of the best besides the newest, as Ray does.
    """
    if not config.keep_best:
        return complete[: -config.keep_latest]
    best = sorted(complete, key=_recorded_loss)[: config.keep_latest]
    return [checkpoint for checkpoint in complete[:-1] if checkpoint not in best]
