"""The driver's side of a training stage: Ray Train's TorchTrainer, scaling, failures, checkpoints, progress.

What a worker does is worker.py's business.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from torch.distributed import DistError

from raylava.cluster.gauges import Gauges
from raylava.cluster.roles import TRAIN, labels_for
from raylava.cluster.session import here
from raylava.config.recipe import Resources
from raylava.console import ProgressBar, poll_in_background
from raylava.errors import RunError, first_line
from raylava.storage import StoragePath, storage_path
from raylava.train.metrics_logger import summary
from raylava.train.spec import CHECKPOINTS, SNAPSHOT, TrainSpec
from raylava.train.watch import ProgressMonitor
from raylava.train.worker import train_loop_per_worker

logger = logging.getLogger(__name__)

_MAX_LOSSES = 8  # in a row, without a checkpoint between them, that a stage survives before it gives up
_COLLECTIVE_TIMEOUT_SECONDS = 1800
_PEER_DISCONNECTED = (  # what collectives say when a process at their other end has ended
    "connection reset by peer",
    "connection closed by peer",
    "connection was likely closed",
    "broken pipe",
    "remote process exit",
)
_SILENCE_SECONDS = 120.0  # after which a run that does not move is told, with the rank that holds it up


def train(spec: TrainSpec, resources: Resources, bar: ProgressBar) -> dict[str, Any]:
    """Run the stage to its end, from its last checkpoint if it has one. Returns the figures of the run.

    Raises RunError with the first line of the cause when training fails.
    """
    output = storage_path(spec.output)
    watch = ProgressMonitor.options(scheduling_strategy=here()).remote()  # type: ignore[attr-defined]
    checkpoints = spec.training.checkpoint
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "spec": spec,
            "watch": watch,
            "threads": resources.cpus_per_worker,
            "cache_bytes": 1e9 * resources.cache_gb,
        },
        torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=(resources.min_workers, resources.workers) if resources.min_workers else resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=_per_worker(resources),
            label_selector=labels_for(TRAIN, resources) or None,
        ),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=output.path,
            storage_filesystem=output.filesystem,
            failure_config=FailureConfig(max_failures=0),  # _fit tells lost workers from errors; Ray does not
            checkpoint_config=CheckpointConfig(
                num_to_keep=checkpoints.keep_latest,
                checkpoint_score_attribute="loss" if checkpoints.keep_best else None,
                checkpoint_score_order="min",
            ),
        ),
    )
    with _shown(watch, bar, spec.stage):
        _fit(trainer, spec.stage, output / CHECKPOINTS / SNAPSHOT, Gauges(output.name, spec.stage))
    (output / CHECKPOINTS).delete()
    return summary(output)


def _fit(trainer: TorchTrainer, stage: str, snapshot: StoragePath, gauges: Gauges) -> None:
    """Train; after a lost worker go on from the last checkpoint, after an error of its own stop at once.

    A run that gets on may lose workers for as long as it lasts: only losses without progress between them count.
    """
    lost = attempt = 0
    before: bytes | None = None
    gauges.set(lost_workers=lost)
    while True:
        try:
            trainer.fit()
            return
        except TrainingFailedError as error:
            gone = lost_workers(error)
            if attempt == _MAX_LOSSES or not gone:
                raise RunError(f"{stage} failed: {_cause(error)}") from error
            now = snapshot.read_bytes() if snapshot.exists() else None
            attempt, before = (attempt + 1, before) if now == before else (0, now)
            lost += len(gone)
            gauges.set(lost_workers=lost)
            logger.warning("%s: lost %s; going on from the last checkpoint", stage, ", ".join(gone))


def lost_workers(error: TrainingFailedError) -> list[str]:
    """Workers whose process or node went away, in words; none where workers raised for reasons of their own.

    Ray names them, but may take longer to know of a dead node than the other ranks, whose collectives fail at once.
    """
    causes = _causes(error)
    dead = [f"worker {rank}" for rank, cause in causes.items() if isinstance(cause, RayActorError)]
    if not dead and causes and all(_is_peer_failure(cause) for cause in causes.values()):
        return [f"a worker that worker {min(causes)} no longer reaches"]
    return dead


def _is_peer_failure(cause: BaseException) -> bool:
    """Whether it is a collective's, of gloo or NCCL, that the process at the other end has left."""
    text = str(cause).lower()
    collective = isinstance(cause, DistError) or (isinstance(cause, RuntimeError) and "gloo" in text)
    return collective and any(words in text for words in _PEER_DISCONNECTED)


def _causes(error: TrainingFailedError) -> dict[int, BaseException]:
    """By rank, workers' own errors rather than Ray's wrapping of them."""
    failures = getattr(error, "worker_failures", None) or {}
    return {
        rank: getattr(failure, "health_check_failure", getattr(failure, "_base_exc", failure))
        for rank, failure in sorted(failures.items())
    }


def _per_worker(resources: Resources) -> dict[str, float]:
    wanted: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        wanted["GPU"] = resources.gpus_per_worker
    return wanted


@contextmanager
def _shown(watch: Any, bar: ProgressBar, stage: str) -> Iterator[None]:
    """Move the bar while `fit` blocks, and tell once when a rank holds the others up."""
    told: str | None = None

    def show() -> None:
        nonlocal told
        steps, silent = ray.get(watch.poll.remote(_SILENCE_SECONDS))
        for done, total, figures in steps:
            bar.update(done, total, **figures)
        if silent and not told:
            logger.warning("%s does not move: %s", stage, silent)
        told = silent

    with poll_in_background(show):
        yield


def _cause(error: TrainingFailedError) -> str:
    """What the first worker says of it that does not merely miss another."""
    causes = _causes(error)
    if not causes:
        return first_line(error)
    rank = min(causes, key=lambda rank: (_is_peer_failure(causes[rank]), rank))
    return f"worker {rank}: {first_line(causes[rank])}"
