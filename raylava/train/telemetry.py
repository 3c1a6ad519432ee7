"""What a run shows while it runs: figures of each step, to metrics.jsonl, TensorBoard and Ray's gauges.

Rank 0 keeps it, beside the result. The ledger (worker.py) is the proof of what was computed; this is how fast, and may
differ from run to run.
"""

import json
import logging
import math
import shutil
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from raylava.storage import Place

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_UPLOAD_EVERY_SECONDS = 60.0


@dataclass(frozen=True)
class StepFigures:
    """One step as people watch it. Rates count the whole step, waiting for data included; memory is this worker's."""

    step: int
    loss: float
    lr: float
    gradient_norm: float | None
    seconds: float
    waiting_share: float
    samples_per_second: float
    tokens_per_second: float
    supervised_tokens_per_second: float
    mfu: float | None
    memory_gb: float
    skipped: bool


def memory_gb(device: torch.device) -> float:
    """Peak memory of the device's allocator, or this process's resident memory on a CPU, in 10⁹ bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return float(psutil.Process().memory_info().rss) / 1e9


class Telemetry:
    """Writes figures to `output` as they come: at once where it is local, each minute where it is not."""

    def __init__(self, output: Place, first: int) -> None:
        self._output = output
        self._folder = Path(output.path) if output.is_local else Path(tempfile.mkdtemp(prefix="raylava-metrics-"))
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = _lines_before(output / METRICS, first)
        self._metrics = (self._folder / METRICS).open("w")
        self._metrics.write("".join(kept))
        self._board = _board(self._folder / TENSORBOARD, first)
        self._gauges = _gauges()
        self._uploaded = time.monotonic()
        self._uploading: threading.Thread | None = None

    def add(self, figures: StepFigures) -> None:
        """Record one step."""
        values = {name: value for name, value in asdict(figures).items() if value is not None}
        self._metrics.write(json.dumps(_finite(values)) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            if name != "step":
                self._board.add_scalar(name, value, figures.step)
                self._gauges[name].set(float(value))
        if not self._output.is_local and time.monotonic() - self._uploaded > _UPLOAD_EVERY_SECONDS:
            self._upload_soon()

    def close(self) -> None:
        """Everything is in `output` when this returns."""
        self._metrics.close()
        self._board.close()
        if self._uploading is not None:
            self._uploading.join()
        if not self._output.is_local:
            self._upload()
            shutil.rmtree(self._folder)

    def _upload_soon(self) -> None:
        """In the background, and not while the last upload is under way. What fails is tried again next time."""
        self._uploaded = time.monotonic()
        if self._uploading is None or not self._uploading.is_alive():
            self._board.flush()
            self._uploading = threading.Thread(target=self._try_upload, name="telemetry", daemon=True)
            self._uploading.start()

    def _try_upload(self) -> None:
        try:
            self._upload()
        except OSError as error:
            logger.warning("metrics could not be written to %s, will be tried again: %s", self._output, error)

    def _upload(self) -> None:
        for name in (METRICS, TENSORBOARD):
            source = self._folder / name
            if source.is_dir():
                (self._output / name).upload_folder(source)
            else:
                (self._output / name).write_bytes(source.read_bytes())


def _lines_before(file: Place, first: int) -> list[str]:
    """An earlier attempt's lines of the steps before `first`."""
    if first == 0 or not file.exists():
        return []
    lines = file.read_bytes().decode().splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first]


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _board(folder: Path, first: int) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first or None)


def _gauges() -> dict[str, Any]:
    """Ray's gauges, by figure: ray_raylava_loss and so on in Prometheus."""
    from ray.util.metrics import Gauge

    names = [name for name in StepFigures.__dataclass_fields__ if name != "step"]
    return {name: Gauge(f"raylava_{name}", description=f"raylava training: {name}") for name in names}
