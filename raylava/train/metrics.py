"""The metrics of a training step, and where they are logged.

ThroughputMeter computes StepMetrics; MetricsLogger writes them to metrics.jsonl and TensorBoard, and to W&B and MLflow
where the recipe names them. These two are extras (`pip install 'raylava[wandb]'`, `'raylava[mlflow]'`) and take their
credentials from the environment. A resumed run continues the same run in each of them. Rank 0 logs; a tracker that
cannot be reached causes a warning and never ends training.
"""

import json
import logging
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from raylava.config.recipe import Tracking, Training
from raylava.corpus.blocks import Lengths
from raylava.errors import first_line
from raylava.perf.flops import step_flops
from raylava.perf.hardware import peak_flops
from raylava.perf.shapes import LlavaShape
from raylava.storage import StoragePath, cache_folder
from raylava.train.data_loader import StepBatch
from raylava.train.engine import StepResult
from raylava.train.step_log import METRICS_LOG

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"
_UPLOAD_INTERVAL_S = 60.0
_NOTABLE_DATA_WAIT = 0.05
_MLFLOW_EXPERIMENT = "raylava"


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one step. Rates count the whole step, waiting for data included; memory is this worker's.

    `step_time_s` excludes the wait for data, of which `data_wait_fraction` is the share of the whole step.
    `checkpoint_stall_s` is the time that training stood still for a checkpoint right before this step.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float | None
    step_time_s: float
    data_wait_fraction: float
    checkpoint_stall_s: float
    samples_per_second: float
    tokens_per_second: float
    loss_tokens_per_second: float
    mfu: float | None
    memory_gb: float
    skipped: bool

    def progress_metrics(self) -> dict[str, float]:
        """Return the main figures, which are displayed with the progress; the wait for data where it is notable."""
        metrics = {"loss": self.loss, "tokens/s": self.tokens_per_second}
        if self.data_wait_fraction > _NOTABLE_DATA_WAIT:
            metrics["waiting for data %"] = 100 * self.data_wait_fraction
        return metrics


def memory_gb(device: torch.device) -> float:
    """Return the peak memory of the device's allocator, or the process's resident memory on a CPU, in 10⁹ bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return float(psutil.Process().memory_info().rss) / 1e9


class ThroughputMeter:
    """Computes StepMetrics for a model of the given `shape` on `world_size` devices like this one."""

    def __init__(
        self,
        shape: LlavaShape,
        lengths: Lengths,
        training: Training,
        language: bool,
        device: torch.device,
        world_size: int,
    ) -> None:
        self._shape, self._lengths, self._device = shape, lengths, device
        self._trainable = {"language": language, "vision": training.vision_lr is not None}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        peak = peak_flops(name)
        self._peak = peak and peak * world_size

    def measure(
        self, batch: StepBatch, result: StepResult, data_wait_s: float, checkpoint_stall_s: float
    ) -> StepMetrics:
        """Return the metrics of one step, given the seconds it waited for data and for a checkpoint before it."""
        samples = batch.step.samples
        duration = result.seconds + data_wait_s
        lengths = [int(length) for length in self._lengths.length[samples]]
        images = int(self._lengths.images[samples].sum())
        flops = step_flops(self._shape, lengths, images, batch.loss_tokens, **self._trainable).total
        return StepMetrics(
            step=batch.step.number,
            loss=result.loss,
            lr=result.lr,
            grad_norm=result.grad_norm,
            step_time_s=result.seconds,
            data_wait_fraction=data_wait_s / duration,
            checkpoint_stall_s=checkpoint_stall_s,
            samples_per_second=len(samples) / duration,
            tokens_per_second=batch.tokens / duration,
            loss_tokens_per_second=batch.loss_tokens / duration,
            mfu=self._peak and flops / duration / self._peak,
            memory_gb=memory_gb(self._device),
            skipped=result.skipped,
        )


class MetricsLogger:
    """Writes metrics to `output`: immediately where it is local, every minute where it is not.

    `first_step` is the step that a resumed run continues with; later lines of an earlier attempt are dropped.
    """

    def __init__(self, output: StoragePath, first_step: int, tracking: Tracking, settings: Mapping[str, Any]) -> None:
        self._output = output
        self._folder = Path(output.path) if output.is_local else Path(tempfile.mkdtemp(prefix="raylava-metrics-"))
        self._folder.mkdir(parents=True, exist_ok=True)
        earlier_lines = _lines_before(output / METRICS_LOG, first_step)
        self._file = (self._folder / METRICS_LOG).open("w")
        self._file.write("".join(earlier_lines))
        run = "/".join(output.uri.rsplit("/", 2)[1:])  # stage and fingerprint
        self._trackers = build_trackers(tracking, self._folder, run, settings, first_step)
        self._uploaded_at = time.monotonic()
        self._upload_thread: threading.Thread | None = None

    def add(self, metrics: StepMetrics) -> None:
        """Log the metrics of one step."""
        values = {name: value for name, value in asdict(metrics).items() if value is not None}
        self._file.write(json.dumps(_replace_non_finite(values)) + "\n")
        self._file.flush()
        step = values.pop("step")
        for tracker in self._trackers:
            tracker.add(step, {name: float(value) for name, value in values.items()})
        if not self._output.is_local and time.monotonic() - self._uploaded_at > _UPLOAD_INTERVAL_S:
            self._upload_in_background()

    def close(self) -> None:
        """Close the trackers and upload everything to `output`."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()
        if self._upload_thread is not None:
            self._upload_thread.join()
        if not self._output.is_local:
            self._upload()
            shutil.rmtree(self._folder)

    def _upload_in_background(self) -> None:
        """Start an upload unless one is in progress. A failed upload is repeated at the next interval."""
        self._uploaded_at = time.monotonic()
        if self._upload_thread is None or not self._upload_thread.is_alive():
            for tracker in self._trackers:
                tracker.flush()
            self._upload_thread = threading.Thread(target=self._try_upload, name="metrics-upload", daemon=True)
            self._upload_thread.start()

    def _try_upload(self) -> None:
        try:
            self._upload()
        except OSError as error:
            logger.warning("metrics could not be written to %s, retrying later: %s", self._output, error)

    def _upload(self) -> None:
        (self._output / METRICS_LOG).write_bytes((self._folder / METRICS_LOG).read_bytes())
        (self._output / TENSORBOARD).upload_folder(self._folder / TENSORBOARD)


class Tracker(Protocol):
    """Receives the metrics of each step by name."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Log one step."""

    def flush(self) -> None:
        """Write buffered metrics."""

    def close(self) -> None:
        """Mark the run as finished."""


def build_trackers(
    tracking: Tracking, folder: Path, run: str, settings: Mapping[str, Any], first_step: int
) -> list[Tracker]:
    """Build the trackers of a run. `run` is its name; TensorBoard's files go below `folder`."""
    trackers: list[Tracker] = [TensorBoard(folder / TENSORBOARD, first_step)]
    if tracking.wandb:
        trackers.append(WeightsAndBiases(tracking.wandb, run, settings))
    if tracking.mlflow:
        trackers.append(MLflow(tracking.mlflow, run, settings))
    return trackers


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write one scalar per metric."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write buffered events to the files."""
        self._writer.flush()

    def close(self) -> None:
        """Close the event files."""
        self._writer.close()


class WeightsAndBiases:
    """A run of a W&B project. Data that was not sent stays in raylava's cache folder, for `wandb sync`."""

    def __init__(self, project: str, run: str, settings: Mapping[str, Any]) -> None:
        import wandb

        name = run.replace("/", "-")
        folder = cache_folder() / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project, id=name, name=name, resume="allow", dir=str(folder), config=dict(settings)
        )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Log one row. W&B ignores steps that it has already seen, which a resumed run computes again."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Do nothing; W&B writes continuously."""

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


class MLflow:
    """A run of the experiment `raylava` on a tracking server, in a database or in a folder."""

    def __init__(self, uri: str, run: str, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(uri)
        self._failing = False
        self._run = self._find_run(run) or self._create_run(run, settings)

    def _find_run(self, run: str) -> str | None:
        experiment = self._client.get_experiment_by_name(_MLFLOW_EXPERIMENT)
        if experiment is None:
            return None
        runs = self._client.search_runs([experiment.experiment_id], f"tags.`raylava.run` = '{run}'")
        return runs[0].info.run_id if runs else None

    def _create_run(self, run: str, settings: Mapping[str, Any]) -> str:
        experiment = self._client.get_experiment_by_name(_MLFLOW_EXPERIMENT)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(_MLFLOW_EXPERIMENT)
        run_id = self._client.create_run(experiment_id, tags={"raylava.run": run}, run_name=run).info.run_id
        for name, value in settings.items():
            self._client.log_param(run_id, name, value)
        return str(run_id)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Log one batch of metrics; warn once when the server rejects them."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        now = int(time.time() * 1000)
        try:
            self._client.log_batch(self._run, [Metric(name, float(value), now, step) for name, value in values.items()])
        except MlflowException as error:
            if not self._failing:
                logger.warning("MLflow rejected metrics: %s", first_line(error))
            self._failing = True

    def flush(self) -> None:
        """Do nothing; the client writes immediately."""

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)


def _lines_before(file: StoragePath, first_step: int) -> list[str]:
    """Return an earlier attempt's complete lines of the steps before `first_step`."""
    if first_step == 0 or not file.exists():
        return []
    lines = file.read_bytes().decode().splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first_step]


def _replace_non_finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity, which JSON cannot represent, by None."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
