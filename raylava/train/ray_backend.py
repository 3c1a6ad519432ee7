"""The Ray Train backend: the driver's side (scaling, failures, progress) and each worker's TrainBackend.

`run` starts a TorchTrainer whose workers run trainer.Trainer. Workers send heartbeats, step metrics and their own
errors to a RunMonitor actor on the driver's node, which the driver polls. Ray Train restarts the workers after every
failure; `RestartPolicy`, which runs in its controller, ends the run instead where a restart cannot help. Only functions
import torch: the monitor's process imports this module, and would take three seconds longer to start.
"""

import logging
import queue
import time
from collections.abc import Iterator, Sequence
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
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
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

_COLLECTIVE_TIMEOUT_S = 1800
_STALL_WARNING_S = 120.0  # without progress for this long, the stalled rank is reported
_MAX_START_FAILURES = 8
_REPORT_INTERVAL_S = 0.5  # between two reports of a worker to the monitor
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
    output = storage_path(spec.output)
    monitor = RunMonitor.options(scheduling_strategy=on_driver_node()).remote()  # type: ignore[attr-defined]
    with report_progress(monitor, progress, spec.stage, Gauges(output.name, spec.stage)):
        _fit(build_trainer(spec, resources, monitor), spec.stage, output / CHECKPOINTS / SNAPSHOT)
    (output / CHECKPOINTS).delete()
    return summarize_run(output)


def build_trainer(spec: TrainSpec, resources: Resources, monitor: Any) -> "TorchTrainer":
    """Return Ray Train's trainer of a stage, whose workers report to a RunMonitor."""
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "spec": spec,
            "monitor": monitor,
            "threads": resources.cpus_per_worker,
            "cache_bytes": 1e9 * resources.cache_gb,
        },
        torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
        scaling_config=_scaling_config(resources),
        run_config=_run_config(spec, monitor),
    )


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


def _run_config(spec: TrainSpec, monitor: Any) -> RunConfig:
    config, output = spec.training.checkpoint, storage_path(spec.output)
    root, stage, fingerprint = output.path.rsplit("/", 2)
    return RunConfig(
        name=f"{stage}/{fingerprint}/{CHECKPOINTS}",  # also the run's name in Ray's dashboard
        storage_path=root,
        storage_filesystem=output.filesystem,
        failure_config=FailureConfig(max_failures=-1),  # RestartPolicy ends runs that a restart cannot help
        callbacks=[RestartPolicy(monitor)],
        checkpoint_config=ray.train.CheckpointConfig(
            num_to_keep=config.keep_latest,
            checkpoint_score_attribute="loss" if config.keep_best else None,
            checkpoint_score_order="min",
        ),
    )


def _fit(trainer: "TorchTrainer", stage: str, snapshot: StoragePath) -> None:
    """Train, while Ray Train restarts lost workers. Raises RunError with the reason when RestartPolicy ends the run.

    Ray Train 2.60 retries neither a worker's death while it starts the training function nor its controller's: then it
    is started again here, up to eight times without a new checkpoint in its `snapshot`.
    """
    failures, last_snapshot = 0, b""
    while True:
        try:
            trainer.fit()
            return
        except (TrainingFailedError, RayActorError) as error:
            reason = error.controller_failure if isinstance(error, ControllerError) else error
            content = snapshot.read_bytes() if snapshot.exists() else b""
            failures, last_snapshot = (failures + 1 if content == last_snapshot else 1), content
            if not isinstance(reason, RayActorError) or failures > _MAX_START_FAILURES:
                raise RunError(f"{stage} failed: {first_line(reason)}") from error
            logger.warning("%s: lost a worker while the workers were starting; starting them again", stage)


class RestartPolicy(UserCallback):
    """Ends the run after a worker's own error, or after `max_failures` restarts without a new checkpoint between them.

    Ray Train calls it in its controller; an exception raised here is a ControllerError, which ends `fit` without a
    restart. A run that makes progress may lose workers any number of times.
    """

    def __init__(self, monitor: Any, max_failures: int = 8) -> None:
        self._monitor, self._max_failures, self._failures = monitor, max_failures, 0
        self._preempted: list[str] = []  # workers whose preemption has been reported

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Start counting anew: all workers have completed a checkpoint."""
        if checkpoint is not None:
            self._failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Count the failure. Raises RunError with the first error that a worker recorded, or after the last attempt.

        A worker's error beside the death of another one is considered a consequence; an independent error recurs. The
        death of a preempted worker is not counted; Ray Train reports it repeatedly until the node is gone.
        """
        deaths = {rank: _death(error) for rank, error in worker_exceptions.items()}
        lost = [f"worker {rank}" for rank, death in sorted(deaths.items()) if death]
        recorded: str | None = ray.get(self._monitor.take_error.remote())
        if recorded and not lost:
            raise RunError(recorded)
        if any(death and death.preempted for death in deaths.values()):
            if lost != self._preempted:
                ray.get(self._monitor.record_loss.remote(lost))
            self._preempted = lost
            return
        self._failures, self._preempted = self._failures + 1, []
        lost = lost or [f"a worker that worker {min(worker_exceptions)} can no longer reach"]
        if self._failures > self._max_failures:
            rank = min(worker_exceptions)
            raise RunError(
                f"lost {', '.join(lost)}; {self._failures} failures without a new checkpoint between them "
                f"(worker {rank}: {first_line(worker_exceptions[rank])})"
            )
        ray.get(self._monitor.record_loss.remote(lost))


def _death(error: Exception) -> RayActorError | None:
    """Return Ray's error of a worker whose process or node is gone; None for errors that the worker raised."""
    cause = getattr(error, "health_check_failure", error)
    return cause if isinstance(cause, RayActorError) else None


def is_peer_failure(error: BaseException) -> bool:
    """Return whether the error is a gloo or NCCL collective's report that its peer process has exited.

    Such an error is a consequence; its cause is the peer's own error, or its death.
    """
    from torch.distributed import DistError

    text = str(error).lower()
    is_collective = isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in text)
    return is_collective and any(message in text for message in _PEER_DISCONNECTED)


@contextmanager
def report_progress(monitor: Any, progress: ProgressBar, stage: str, gauges: Gauges) -> Iterator[None]:
    """While `fit` blocks, update the progress bar, report lost workers, and warn once when a rank stalls."""
    last_stall: str | None = None
    total_lost = 0
    gauges.set(lost_workers=total_lost)

    def poll() -> None:
        nonlocal last_stall, total_lost
        report: MonitorReport = ray.get(monitor.poll.remote(_STALL_WARNING_S))
        for line in report.lines:
            progress.say(line)
        for done, total, metrics in report.updates:
            progress.update(done, total, **metrics)
        for lost in report.losses:
            total_lost += len(lost)
            gauges.set(lost_workers=total_lost)
            logger.warning("%s: lost %s; resuming from the last checkpoint", stage, ", ".join(lost))
        if report.stall and not last_stall:
            logger.warning("%s is stalled: %s", stage, report.stall)
        last_stall = report.stall

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


@dataclass(frozen=True)
class MonitorReport:
    """What happened since the driver's last poll.

    `updates` are the completed steps, in order, `losses` the workers lost at each restart; `stall` describes the
    stalled rank, if there is one. `lines` are to be displayed.
    """

    lines: list[str]
    updates: list[StepUpdate]
    losses: list[list[str]]
    stall: str | None


@ray.remote(num_cpus=0)
class RunMonitor:
    """Actor that collects heartbeats, the metrics of completed steps, and errors of all ranks."""

    def __init__(self) -> None:
        self._heartbeats: dict[int, Heartbeat] = {}
        self._lines: list[str] = []
        self._updates: list[StepUpdate] = []
        self._losses: list[list[str]] = []
        self._first_error: str | None = None

    def report(self, rank: int, step: int, phase: str, seconds: float, updates: list[StepUpdate]) -> None:
        """Record that a rank entered a phase of a step `seconds` ago, and the steps completed since its last report."""
        self._heartbeats[rank] = Heartbeat(rank, step, phase, time.monotonic() - seconds)
        self._updates += updates

    def announce(self, lines: list[str]) -> None:
        """Record lines to be displayed by the driver."""
        self._lines += lines

    def record_error(self, rank: int, message: str) -> None:
        """Record an error of a rank's own, before the rank raises it and the other ranks fail in turn."""
        self._first_error = self._first_error or f"worker {rank}: {message}"

    def take_error(self) -> str | None:
        """Return the first error that a rank recorded since the last call."""
        error, self._first_error = self._first_error, None
        return error

    def start_attempt(self) -> None:
        """Forget the ranks of an earlier group of workers, whose number may have been another."""
        self._heartbeats.clear()

    def record_loss(self, workers: list[str]) -> None:
        """Record a failure after which Ray Train restarts the workers."""
        self._losses.append(workers)

    def poll(self, timeout_s: float) -> MonitorReport:
        """Return what happened since the last poll."""
        stall = find_stalled_rank(list(self._heartbeats.values()), time.monotonic(), timeout_s)
        report = MonitorReport(self._lines, self._updates, self._losses, stall)
        self._lines, self._updates, self._losses = [], [], []
        return report


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Run the Trainer in a Ray Train worker. `config` holds spec, monitor, threads and cache_bytes."""
    import torch

    from raylava.train.trainer import Trainer  # not at module level: Ray's controller would import the models too

    torch.set_num_threads(config["threads"])
    with record_errors(config["monitor"]):
        backend = _RayBackend(config["spec"], config["monitor"])
        with poll_in_background(backend.send_report, _REPORT_INTERVAL_S):
            Trainer(config["spec"], backend, config["cache_bytes"]).run()


@contextmanager
def record_errors(monitor: Any) -> Iterator[None]:
    """Record errors of this worker's own in the monitor before they are raised, which ends the peers' collectives."""
    try:
        yield
    except Exception as error:
        if not is_peer_failure(error):
            ray.get(monitor.record_error.remote(ray.train.get_context().get_world_rank(), first_line(error)))
        raise


class _RayBackend:
    """A TrainBackend on Ray Train: checkpoints through ray.train.report, heartbeats and metrics to the monitor.

    The training thread only notes its phase and completed steps; `send_report`, called by another thread, sends them.
    """

    def __init__(self, spec: TrainSpec, monitor: Any) -> None:
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._checkpoints, self._monitor = storage_path(spec.output) / CHECKPOINTS, monitor
        self._initial_state = spec.initial_state and storage_path(spec.initial_state)
        if self.rank == 0:
            ray.get(monitor.start_attempt.remote())
        self._gauges = Gauges(storage_path(spec.output).name, spec.stage, self.rank)
        self._started_at = self._loading_since = time.monotonic()
        self._phase: tuple[int, str, float] | None = None  # step, phase, time of entering it
        self._sent_phase: tuple[int, str, float] | None = None
        self._updates: queue.SimpleQueue[StepUpdate] = queue.SimpleQueue()

    def send_report(self) -> None:
        """Send the latest phase, if it is new, and the steps completed since the last call."""
        phase = self._phase
        if phase is None or phase == self._sent_phase:
            return
        updates = [self._updates.get_nowait() for _ in range(self._updates.qsize())]
        step, name, entered_at = phase
        ray.get(self._monitor.report.remote(self.rank, step, name, time.monotonic() - entered_at, updates))
        self._sent_phase = phase

    @contextmanager
    def last_checkpoint(self) -> Iterator[CheckpointRef | None]:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None and self._initial_state:
            checkpoint = Checkpoint(self._initial_state.path, self._initial_state.filesystem)
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield CheckpointRef(Path(folder), checkpoint.path)

    def save_async(self, folder: Path, step: int, loss: float, upload: Upload) -> None:
        name = f"step-{step:08d}"
        target = self._checkpoints / name

        def upload_part(local: Checkpoint, _: str) -> Checkpoint:
            with record_errors(self._monitor):
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

    @contextmanager
    def best_checkpoint(self) -> Iterator[tuple[CheckpointRef, float] | None]:
        reported = ray.train.get_all_reported_checkpoints() if self.rank == 0 else []
        best = min(reported, key=lambda candidate: candidate.metrics["loss"], default=None)
        if best is None:
            yield None
            return
        with best.checkpoint.as_directory() as folder:
            yield CheckpointRef(Path(folder), best.checkpoint.path), float(best.metrics["loss"])

    def preemption_pending(self) -> bool:
        return ray.train.get_preemption_info() is not None

    def heartbeat(self, step: int, phase: str) -> None:
        self._phase = (step, phase, time.monotonic())
        if phase == LOADING:
            self._loading_since = time.monotonic()
        elif phase == COMPUTING:
            self._gauges.set(data_wait_s=time.monotonic() - self._loading_since)

    def report(self, metrics: "StepMetrics", steps: int) -> None:
        self._updates.put((metrics.step + 1, steps, metrics.progress_metrics()))
        self._gauges.set(**asdict(metrics))
        self._gauges.set(worker_seconds=self.world_size * (time.monotonic() - self._started_at))

    def announce(self, lines: Sequence[str]) -> None:
        ray.get(self._monitor.announce.remote(list(lines)))
