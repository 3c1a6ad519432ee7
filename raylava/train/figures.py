"""What a step costs and how fast it went: the figures that people watch."""

from dataclasses import dataclass

import psutil
import torch

from raylava.corpus.blocks import Lengths
from raylava.cost.flops import step_flops
from raylava.cost.hardware import peak_flops
from raylava.cost.shapes import LlavaShape
from raylava.recipe import Training
from raylava.train.engine import StepResult
from raylava.train.feed import StepWork


@dataclass(frozen=True)
class StepFigures:
    """One step as people watch it. Rates count the whole step, waiting for data included; memory is this worker's.

    `saving_seconds` is how long training stood still for a checkpoint right before this step.
    """

    step: int
    loss: float
    lr: float
    gradient_norm: float | None
    seconds: float
    waiting_share: float
    saving_seconds: float
    samples_per_second: float
    tokens_per_second: float
    supervised_tokens_per_second: float
    mfu: float | None
    memory_gb: float
    skipped: bool

    def shown(self) -> dict[str, float]:
        """The few that stand beside a bar."""
        few = {"loss": self.loss, "tok/s": self.tokens_per_second, "wait": self.waiting_share}
        return few if self.mfu is None else few | {"mfu": self.mfu}


def memory_gb(device: torch.device) -> float:
    """Peak memory of the device's allocator, or this process's resident memory on a CPU, in 10⁹ bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return float(psutil.Process().memory_info().rss) / 1e9


class Meter:
    """Turns steps' outcomes into figures, for a model of such a `shape` on `world_size` devices like this one."""

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

    def figures(self, work: StepWork, result: StepResult, waited: float, saving: float) -> StepFigures:
        """One step's. `waited` and `saving` in seconds: for its data, and for a checkpoint before it."""
        samples = work.step.samples
        whole = result.seconds + waited
        lengths = [int(length) for length in self._lengths.length[samples]]
        images = int(self._lengths.images[samples].sum())
        flops = step_flops(self._shape, lengths, images, work.supervised, **self._trains).total
        return StepFigures(
            step=work.step.number,
            loss=result.loss,
            lr=result.lr,
            gradient_norm=result.gradient_norm,
            seconds=result.seconds,
            waiting_share=waited / whole,
            saving_seconds=saving,
            samples_per_second=len(samples) / whole,
            tokens_per_second=work.tokens / whole,
            supervised_tokens_per_second=work.supervised / whole,
            mfu=self._peak and flops / whole / self._peak,
            memory_gb=memory_gb(self._device),
            skipped=result.skipped,
        )
