"""The driver's side of a training stage: Ray Train's TorchTrainer, scaling, failures, checkpoints, progress.

What a worker does is worker.py's business.
"""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from raylava.console import Bar
from raylava.errors import RunError, first_line
from raylava.recipe import Resources
from raylava.session import Progress
from raylava.storage import place
from raylava.train.worker import LEDGER, TrainJob, train_worker

logger = logging.getLogger(__name__)

_CHECKPOINTS = "checkpoints"  # the Ray Train run's folder within the draft; removed once the result stands
_MAX_LOSSES = 8  # lost workers that a stage survives before it gives up
_COLLECTIVE_TIMEOUT_SECONDS = 1800


def train(job: TrainJob, resources: Resources, bar: Bar) -> dict[str, Any]:
    """Run the stage to its end, from its last checkpoint if it has one. Returns the figures of the run.

    Raises RunError with the first line of the cause when training fails.
    """
    output = place(job.output)
    progress = Progress.remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "progress": progress, "threads": resources.cpus_per_worker},
        torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=_per_worker(resources),
        ),
        run_config=RunConfig(
            name=_CHECKPOINTS,
            storage_path=output.path,
            storage_filesystem=output.filesystem,
            failure_config=FailureConfig(max_failures=0),  # _fit tells lost workers from errors; Ray does not
            checkpoint_config=CheckpointConfig(num_to_keep=job.training.checkpoints.keep),
        ),
    )
    with _shown(progress, bar):
        _fit(trainer, job.stage)
    (output / _CHECKPOINTS).delete()
    return _summary((output / LEDGER).read_bytes())


def _fit(trainer: TorchTrainer, stage: str) -> None:
    """Train; after a lost worker go on from the last checkpoint, after an error of its own stop at once."""
    for attempt in range(_MAX_LOSSES + 1):
        try:
            trainer.fit()
            return
        except TrainingFailedError as error:
            if attempt == _MAX_LOSSES or not _lost_workers(error):
                raise RunError(f"{stage} failed: {_cause(error)}") from error
            logger.warning("%s: lost worker %s; going on from the last checkpoint", stage, _lost_workers(error))


def _lost_workers(error: TrainingFailedError) -> list[int]:
    """Ranks whose process or node went away, as against those that raised."""
    failures = getattr(error, "worker_failures", None) or {}
    return [
        rank
        for rank, failure in sorted(failures.items())
        if isinstance(getattr(failure, "health_check_failure", failure), RayActorError)
    ]


def _per_worker(resources: Resources) -> dict[str, float]:
    wanted: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        wanted["GPU"] = resources.gpus_per_worker
    return wanted


@contextmanager
def _shown(progress: Any, bar: Bar) -> Iterator[None]:
    """Move the bar from a thread while `fit` blocks."""
    stopping = threading.Event()

    def show() -> None:
        while not stopping.wait(0.5):
            last = ray.get(progress.last.remote())
            if last is not None:
                bar.update(last[0], last[1], **last[2])

    thread = threading.Thread(target=show, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
        last = ray.get(progress.last.remote())
        if last is not None:
            bar.update(last[0], last[1], **last[2])


def _cause(error: TrainingFailedError) -> str:
    """The first worker's own error rather than Ray's wrapping of it."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "_base_exc", failure)
        return f"worker {rank}: {first_line(cause)}"
    return first_line(error)


def _summary(ledger: bytes) -> dict[str, Any]:
    steps = [json.loads(line) for line in ledger.splitlines()]
    last = steps[-max(1, len(steps) // 20) :]
    computing = sum(step["seconds"] for step in steps)
    waiting = sum(step["waited"] for step in steps)
    return {
        "steps": len(steps),
        "samples": sum(len(step["samples"]) for step in steps),
        "tokens": sum(step["tokens"] for step in steps),
        "supervised_tokens": sum(step["supervised"] for step in steps),
        "first_loss": steps[0]["loss"],
        "final_loss": sum(step["loss"] for step in last) / len(last),
        "tokens_per_second": sum(step["tokens"] for step in steps) / (computing + waiting),
        "waiting_share": waiting / (computing + waiting),
    }
