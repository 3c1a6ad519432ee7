"""What each Ray Train worker runs, and its TrainBackend. Heartbeats, step metrics and errors go to the RunMonitor."""

import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from raylava.cluster.gauges import Gauges
from raylava.errors import first_line
from raylava.perf.memory import ExecutionConfig
from raylava.progress import poll_in_background
from raylava.storage import storage_path
from raylava.train.backend import COMPUTING, LOADING, CheckpointRef, Upload
from raylava.train.ray.failures import is_device_failure, is_peer_failure
from raylava.train.ray.monitor import StepUpdate
from raylava.train.spec import TrainSpec
from raylava.train.step_log import CHECKPOINTS

if TYPE_CHECKING:
    import torch

    from raylava.train.metrics import StepMetrics

_REPORT_INTERVAL_S = 0.5  # between two reports of a worker to the monitor


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Run the Trainer in a Ray Train worker. `config` holds spec, monitor, threads and cache_bytes."""
    import torch

    from raylava.train.trainer import Trainer  # not at module level: Ray's controller would import the models too

    torch.set_num_threads(config["threads"])
    with record_errors(config["monitor"]):
        backend = _RayBackend(config["spec"], config["monitor"])
        if backend.device.type == "cuda":
            torch.cuda.set_device(backend.device)  # per thread; Ray Train runs this function in a new one
        with poll_in_background(backend.send_report, _REPORT_INTERVAL_S):
            Trainer(config["spec"], backend, config["cache_bytes"]).run()


@contextmanager
def record_errors(monitor: Any) -> Iterator[None]:
    """Record errors of this worker's own in the monitor before they are raised, which ends the peers' collectives."""
    try:
        yield
    except Exception as error:
        rank = ray.train.get_context().get_world_rank()
        if is_device_failure(error):
            node = ray.get_runtime_context().get_node_id()
            message = f"a GPU of node {ray.util.get_node_ip_address()} failed in worker {rank}: {first_line(error)}"
            ray.get(monitor.record_broken_node.remote(node, message))
        elif not is_peer_failure(error):
            ray.get(monitor.record_error.remote(rank, first_line(error)))
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

    def reject(self, config: ExecutionConfig) -> None:
        ray.get(self._monitor.reject_config.remote(config))

    def announce(self, lines: Sequence[str]) -> None:
        ray.get(self._monitor.announce.remote(list(lines)))
