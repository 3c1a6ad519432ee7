"""The Ray Train backend: the driver's side (scaling, failures, progress) and each worker's TrainBackend.

`run` starts a TorchTrainer whose workers run trainer.Trainer. Workers send heartbeats and step metrics to a
ProgressMonitor actor on the driver's node, which the driver polls. Only functions import torch: the monitor's process
imports this module, and would take three seconds longer to start.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import (
    Checkpoint,
    CheckpointUploadMode,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)

from raylava.cluster.gauges import Gauges
from raylava.cluster.roles import TRAIN, node_labels_for
from raylava.cluster.session import on_driver_node
from raylava.config.recipe import Resources
from raylava.errors import RunError, first_line
from raylava.progress import ProgressBar, poll_in_background
from raylava.storage import StoragePath, storage_path
from raylava.train.backend import COMPUTING, LOADING, SAVING, CheckpointRef, Upload
from raylava.train.spec import TrainSpec
from raylava.train.step_log import CHECKPOINTS, SNAPSHOT, summarize_run

if TYPE_CHECKING:
    import torch
    from ray.train.torch import TorchTrainer

    from raylava.train.metrics import StepMetrics

logger = logging.getLogger(__name__)

_MAX_WORKER_FAILURES = 8  # consecutive failures without a new checkpoint between them, after which a stage fails
_COLLECTIVE_TIMEOUT_S = 1800
_STALL_WARNING_S = 120.0  # without progress for this long, the stalled rank is reported
_PEER_DISCONNECTED = (  # messages of collectives whose peer process has exited
    "connection reset by peer",
    "connection closed by peer",
    "connection was likely closed",
    "broken pipe",
    "remote process exit",
)
StepUpdate = tuple[int, int, dict[str, float]]  # completed steps, total steps, metrics of the last completed step


def run(spec: TrainSpec, resources: Resources, progress: ProgressBar) -> dict[str, Any]:
    """Train the stage to its end, from its latest checkpoint if there is one. Return the run's metrics.

    Raises RunError with the first line of the root cause when training fails.
    """
    from ray.train.torch import TorchConfig, TorchTrainer

    output = storage_path(spec.output)
    monitor = ProgressMonitor.options(scheduling_strategy=on_driver_node()).remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "spec": spec,
            "monitor": monitor,
            "threads": resources.cpus_per_worker,
            "cache_bytes": 1e9 * resources.cache_gb,
        },
        torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
        scaling_config=_scaling_config(resources),
        run_config=_run_config(spec, output),
    )
    with _report_progress(monitor, progress, spec.stage):
        _fit(trainer, spec.stage, output / CHECKPOINTS / SNAPSHOT, Gauges(output.name, spec.stage))
    (output / CHECKPOINTS).delete()
    return summarize_run(output)


def _scaling_config(resources: Resources) -> ScalingConfig:
    workers = (resources.min_workers, resources.workers) if resources.min_workers else resources.workers
    bundle: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        bundle["GPU"] = resources.gpus_per_worker
    return ScalingConfig(
        num_workers=workers,
        use_gpu=resources.gpus_per_worker > 0,
        resources_per_worker=bundle,
        label_selector=node_labels_for(TRAIN, resources) or None,
    )


def _run_config(spec: TrainSpec, output: StoragePath) -> RunConfig:
    config = spec.training.checkpoint
    return RunConfig(
        name=CHECKPOINTS,
        storage_path=output.path,
        storage_filesystem=output.filesystem,
        failure_config=FailureConfig(max_failures=0),  # _fit distinguishes lost workers from errors; Ray does not
        checkpoint_config=ray.train.CheckpointConfig(
            num_to_keep=config.keep_latest,
            checkpoint_score_attribute="loss" if config.keep_best else None,
            checkpoint_score_order="min",
        ),
    )


def _fit(trainer: "TorchTrainer", stage: str, snapshot: StoragePath, gauges: Gauges) -> None:
    """Train; resume from the latest checkpoint after a lost worker, fail at once after an error of the run itself.

    A run that makes progress may lose workers any number of times: only failures without a new checkpoint between
    them count towards _MAX_WORKER_FAILURES.
    """
    total_lost = failures = 0
    last_snapshot: bytes | None = None
    gauges.set(lost_workers=total_lost)
    while True:
        try:
            trainer.fit()
            return
        except TrainingFailedError as error:
            lost = lost_workers(error)
            if failures == _MAX_WORKER_FAILURES or not lost:
                raise RunError(f"{stage} failed: {_root_cause(error)}") from error
            content = snapshot.read_bytes() if snapshot.exists() else None
            failures, last_snapshot = (failures + 1, last_snapshot) if content == last_snapshot else (0, content)
            total_lost += len(lost)
            gauges.set(lost_workers=total_lost)
            logger.warning("%s: lost %s; resuming from the last checkpoint", stage, ", ".join(lost))


def lost_workers(error: TrainingFailedError) -> list[str]:
    """Describe the workers whose process or node is gone; empty where workers raised errors of their own.

    Ray names lost workers, but may learn of a dead node later than the other ranks, whose collectives fail at once.
    """
    causes = _causes_by_rank(error)
    dead = [f"worker {rank}" for rank, cause in causes.items() if isinstance(cause, RayActorError)]
    if not dead and causes and all(_is_peer_failure(cause) for cause in causes.values()):
        return [f"a worker that worker {min(causes)} can no longer reach"]
    return dead


def _is_peer_failure(cause: BaseException) -> bool:
    """Return whether the error is a gloo or NCCL collective's report that its peer process has exited."""
    from torch.distributed import DistError

    text = str(cause).lower()
    is_collective = isinstance(cause, DistError) or (isinstance(cause, RuntimeError) and "gloo" in text)
    return is_collective and any(message in text for message in _PEER_DISCONNECTED)


def _causes_by_rank(error: TrainingFailedError) -> dict[int, BaseException]:
    """Return each failed worker's own error, without Ray's wrapper."""
    failures = getattr(error, "worker_failures", None) or {}
    return {
        rank: getattr(failure, "health_check_failure", getattr(failure, "_base_exc", failure))
        for rank, failure in sorted(failures.items())
    }


def _root_cause(error: TrainingFailedError) -> str:
    """Return the root cause: the first worker error that is not a peer disconnect."""
    causes = _causes_by_rank(error)
    if not causes:
        return first_line(error)
    rank = min(causes, key=lambda rank: (_is_peer_failure(causes[rank]), rank))
    return f"worker {rank}: {first_line(causes[rank])}"


@contextmanager
def _report_progress(monitor: Any, progress: ProgressBar, stage: str) -> Iterator[None]:
    """Update the progress bar while `fit` blocks, and warn once when a rank stalls."""
    last_stall: str | None = None

    def poll() -> None:
        nonlocal last_stall
        updates, stall = ray.get(monitor.poll.remote(_STALL_WARNING_S))
        for done, total, metrics in updates:
            progress.update(done, total, **metrics)
        if stall and not last_stall:
            logger.warning("%s is stalled: %s", stage, stall)
        last_stall = stall

    with poll_in_background(poll):
        yield


@dataclass(frozen=True)
class Heartbeat:
    """The last report of a rank: the phase it entered, in which step, and when (seconds of the monitor's clock)."""

    rank: int
    step: int
    phase: str
    time: float


def find_stalled_rank(heartbeats: list[Heartbeat], now: float, timeout_s: float) -> str | None:
    """Describe the rank that blocks the others, once no rank has sent a heartbeat for `timeout_s` seconds.

    Ranks wait for each other in every step, so the rank that is furthest behind is the cause.
    """
    if not heartbeats or any(now - heartbeat.time < timeout_s for heartbeat in heartbeats):
        return None
    order = {LOADING: 0, COMPUTING: 1, SAVING: 2}
    stalled = min(heartbeats, key=lambda heartbeat: (heartbeat.step, order[heartbeat.phase], heartbeat.time))
    return f"rank {stalled.rank} has been {stalled.phase} in step {stalled.step} for {now - stalled.time:.0f} s"


@ray.remote(num_cpus=0)
class ProgressMonitor:
    """Actor that collects the heartbeats of all ranks and the metrics of completed steps."""

    def __init__(self) -> None:
        self._heartbeats: dict[int, Heartbeat] = {}
        self._updates: list[StepUpdate] = []

    def heartbeat(self, rank: int, step: int, phase: str) -> None:
        """Record that a rank enters a phase of a step."""
        self._heartbeats[rank] = Heartbeat(rank, step, phase, time.monotonic())

    def update(self, done: int, total: int, **metrics: float) -> None:
        """Record a completed step."""
        self._updates.append((done, total, metrics))

    def poll(self, timeout_s: float) -> tuple[list[StepUpdate], str | None]:
        """Return the updates since the last poll, in order, and a description of the stalled rank, if any."""
        updates, self._updates = self._updates, []
        return updates, find_stalled_rank(list(self._heartbeats.values()), time.monotonic(), timeout_s)


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Run the Trainer in a Ray Train worker. `config` holds spec, monitor, threads and cache_bytes."""
    import torch

    from raylava.train.trainer import Trainer  # not at module level: Ray's controller would import the models too

    torch.set_num_threads(config["threads"])
    Trainer(config["spec"], _RayBackend(config["spec"], config["monitor"]), config["cache_bytes"]).run()


class _RayBackend:
    """A TrainBackend on Ray Train: checkpoints through ray.train.report, heartbeats and metrics to the monitor."""

    def __init__(self, spec: TrainSpec, monitor: Any) -> None:
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._checkpoints, self._monitor = storage_path(spec.output) / CHECKPOINTS, monitor
        self._gauges = Gauges(storage_path(spec.output).name, spec.stage, self.rank)
        self._started_at = self._loading_since = time.monotonic()

    @contextmanager
    def last_checkpoint(self) -> Iterator[CheckpointRef | None]:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield CheckpointRef(Path(folder), checkpoint.path)

    def save_async(self, folder: Path, step: int, loss: float, upload: Upload) -> None:
        name = f"step-{step:08d}"
        target = self._checkpoints / name

        def upload_part(local: Checkpoint, _: str) -> Checkpoint:
            upload(Path(local.path), target)
            self._gauges.set(checkpoint_time_seconds=time.time())
            return Checkpoint(path=target.path, filesystem=target.filesystem)

        ray.train.report(
            {"step": step, "loss": loss},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload_part,
        )

    def preemption_pending(self) -> bool:
        return ray.train.get_preemption_info() is not None

    def heartbeat(self, step: int, phase: str) -> None:
        self._monitor.heartbeat.remote(self.rank, step, phase)
        if phase == LOADING:
            self._loading_since = time.monotonic()
        elif phase == COMPUTING:
            self._gauges.set(data_wait_s=time.monotonic() - self._loading_since)

    def report(self, metrics: "StepMetrics", steps: int) -> None:
        self._monitor.update.remote(metrics.step + 1, steps, **metrics.progress_metrics())
        self._gauges.set(**asdict(metrics))
        self._gauges.set(worker_seconds=self.world_size * (time.monotonic() - self._started_at))
