"""The metrics of a training step: loss, throughput, model FLOPs utilization, memory."""

from dataclasses import dataclass

import psutil
import torch

from raylava.config.recipe import Training
from raylava.corpus.blocks import Lengths
from raylava.perf.flops import step_flops
from raylava.perf.hardware import peak_flops
from raylava.perf.shapes import LlavaShape
from raylava.train.data_loader import StepBatch
from raylava.train.engine import StepResult


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
        """Return the few metrics that are displayed beside a progress bar."""
        metrics = {"loss": self.loss, "tok/s": self.tokens_per_second, "wait": self.data_wait_fraction}
        return metrics if self.mfu is None else metrics | {"mfu": self.mfu}


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
