"""What a step costs and how fast it went: the metrics that people watch."""

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
    """One step as people watch it. Rates count the whole step, waiting for data included; memory is this worker's.

    `checkpoint_stall_s` is how long training stood still for a checkpoint right before this step.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float | None
    seconds: float
    data_wait_fraction: float
    checkpoint_stall_s: float
    samples_per_second: float
    tokens_per_second: float
    loss_tokens_per_second: float
    mfu: float | None
    memory_gb: float
    skipped: bool

    def shown(self) -> dict[str, float]:
        """The few that stand beside a bar."""
        few = {"loss": self.loss, "tok/s": self.tokens_per_second, "wait": self.data_wait_fraction}
        return few if self.mfu is None else few | {"mfu": self.mfu}


def memory_gb(device: torch.device) -> float:
    """Peak memory of the device's allocator, or this process's resident memory on a CPU, in 10⁹ bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return float(psutil.Process().memory_info().rss) / 1e9


class ThroughputMeter:
    """Turns steps' outcomes into metrics, for a model of such a `shape` on `world_size` devices like this one."""

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
        self._trains = {"language": language, "vision": training.vision_lr is not None}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        peak = peak_flops(name)
        self._peak = peak and peak * world_size

    def metrics(self, work: StepBatch, result: StepResult, waited: float, saving: float) -> StepMetrics:
        """One step's. `waited` and `saving` in seconds: for its data, and for a checkpoint before it."""
        samples = work.step.samples
        whole = result.seconds + waited
        lengths = [int(length) for length in self._lengths.length[samples]]
        images = int(self._lengths.images[samples].sum())
        flops = step_flops(self._shape, lengths, images, work.loss_tokens, **self._trains).total
        return StepMetrics(
            step=work.step.number,
            loss=result.loss,
            lr=result.lr,
            grad_norm=result.grad_norm,
            seconds=result.seconds,
            data_wait_fraction=waited / whole,
            checkpoint_stall_s=saving,
            samples_per_second=len(samples) / whole,
            tokens_per_second=work.tokens / whole,
            loss_tokens_per_second=work.loss_tokens / whole,
            mfu=self._peak and flops / whole / self._peak,
            memory_gb=memory_gb(self._device),
            skipped=result.skipped,
        )
