"""What a run leaves to be seen: metrics of each step in metrics.jsonl and the trackers, beside the result.

Rank 0 keeps it. The ledger (ledger.py) is the proof of what was computed; this is how fast, and may differ from run to
run.
"""

import json
import logging
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raylava.artifacts import Artifact
from raylava.config.recipe import Tracking
from raylava.storage import StoragePath
from raylava.train.data_loader import StepBatch
from raylava.train.engine import StepResult
from raylava.train.metrics import StepMetrics, ThroughputMeter
from raylava.train.step_log import STEP_LOG
from raylava.train.trackers import TENSORBOARD, trackers

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
_UPLOAD_EVERY_SECONDS = 60.0


class MetricsLogger:
    """Writes metrics to `output` as they come: at once where it is local, each minute where it is not."""

    def __init__(
        self, output: StoragePath, first: int, meter: ThroughputMeter, tracking: Tracking, settings: Mapping[str, Any]
    ) -> None:
        self._output, self._meter = output, meter
        self._folder = Path(output.path) if output.is_local else Path(tempfile.mkdtemp(prefix="raylava-metrics-"))
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = _lines_before(output / METRICS, first)
        self._metrics = (self._folder / METRICS).open("w")
        self._metrics.write("".join(kept))
        run = "/".join(output.uri.rsplit("/", 2)[1:])  # stage and fingerprint
        self._trackers = trackers(tracking, self._folder, run, settings, first)
        self._uploaded = time.monotonic()
        self._uploading: threading.Thread | None = None

    def add(self, work: StepBatch, result: StepResult, waited: float, saving: float) -> StepMetrics:
        """Record one step; see Meter.metrics."""
        metrics = self._meter.metrics(work, result, waited, saving)
        values = {name: value for name, value in asdict(metrics).items() if value is not None}
        self._metrics.write(json.dumps(_finite(values)) + "\n")
        self._metrics.flush()
        step = values.pop("step")
        for tracker in self._trackers:
            tracker.add(step, {name: float(value) for name, value in values.items()})
        if not self._output.is_local and time.monotonic() - self._uploaded > _UPLOAD_EVERY_SECONDS:
            self._upload_soon()
        return metrics

    def close(self) -> None:
        """Everything is in `output` when this returns."""
        self._metrics.close()
        for tracker in self._trackers:
            tracker.close()
        if self._uploading is not None:
            self._uploading.join()
        if not self._output.is_local:
            self._upload()
            shutil.rmtree(self._folder)

    def _upload_soon(self) -> None:
        """In the background, and not while the last upload is under way. What fails is tried again next time."""
        self._uploaded = time.monotonic()
        if self._uploading is None or not self._uploading.is_alive():
            for tracker in self._trackers:
                tracker.flush()
            self._uploading = threading.Thread(target=self._try_upload, name="telemetry", daemon=True)
            self._uploading.start()

    def _try_upload(self) -> None:
        try:
            self._upload()
        except OSError as error:
            logger.warning("metrics could not be written to %s, will be tried again: %s", self._output, error)

    def _upload(self) -> None:
        (self._output / METRICS).write_bytes((self._folder / METRICS).read_bytes())
        (self._output / TENSORBOARD).upload_folder(self._folder / TENSORBOARD)


def summary(output: StoragePath) -> dict[str, Any]:
    """The metrics of a finished run, from its ledger and metrics."""
    steps = [json.loads(line) for line in (output / STEP_LOG).read_bytes().splitlines()]
    speeds = [json.loads(line) for line in (output / METRICS).read_bytes().splitlines()]
    losses = [step["loss"] for step in steps if not step["skipped"]]
    last = losses[-max(1, len(steps) // 20) :]
    whole = [speed["seconds"] / (1.0 - speed["data_wait_fraction"]) for speed in speeds]
    return {
        "steps": len(steps),
        "skipped_steps": sum(step["skipped"] for step in steps),
        "samples": sum(step["samples"] for step in steps),
        "tokens": sum(step["tokens"] for step in steps),
        "loss_tokens": sum(step["loss_tokens"] for step in steps),
        "first_loss": losses[0],
        "final_loss": sum(last) / len(last),
        "tokens_per_second": sum(step["tokens"] for step in steps) / sum(whole),
        "data_wait_fraction": 1.0 - sum(speed["seconds"] for speed in speeds) / sum(whole),
    }


def training_seconds(output: StoragePath, made: Artifact | None) -> float:
    """What a training took, all its attempts together: its steps, and of the last attempt all there was beside them.

    0 where it left no metrics.
    """
    whole = float(made.record["seconds"]) if made else 0.0
    return max(whole, sum(step["seconds"] / (1.0 - step["data_wait_fraction"]) for step in recorded_steps(output)))


def recorded_steps(output: StoragePath) -> list[dict[str, Any]]:
    """The metrics of each step of a training, finished or not; a last line that was cut off is left out."""
    file = output / METRICS
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_bytes().decode().splitlines(keepends=True) if line.endswith("\n")]


def _lines_before(file: StoragePath, first: int) -> list[str]:
    """An earlier attempt's lines of the steps before `first`."""
    if first == 0 or not file.exists():
        return []
    lines = file.read_bytes().decode().splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first]


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
