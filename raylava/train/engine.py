"""DeepSpeed: build, step, save, load. Knows nothing of Ray, of blocks or of plans.

A step takes any number of packs: their summed losses, divided by the supervised tokens of all ranks, are its loss.
DeepSpeed averages gradients over ranks, so each rank's loss is scaled up by the number of ranks first.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raylava.errors import RunError
from raylava.model.llava import PackLoss, PackTensors, StageName, choose_trainable
from raylava.recipe import Training

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_TAG = "state"  # one checkpoint folder holds one DeepSpeed tag
_CURSOR = "cursor.json"


@dataclass(frozen=True)
class StepResult:
    """One step over all ranks. `loss` is per supervised token; `seconds` are this rank's. `gradient_norm` is
    before clipping, and None where DeepSpeed does not tell it (ZeRO stage 0 in fp32).
    """

    loss: float
    gradient_norm: float | None
    lr: float
    seconds: float


def learning_rate(step: int, steps: int, training: Training) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up over `warmup`·steps, then the schedule down to
    zero.
    """
    warmup = math.ceil(training.warmup * steps)
    if step < warmup:
        return training.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if training.schedule == "cosine":
        return training.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    return training.lr * (1.0 - progress if training.schedule == "linear" else 1.0)


class Engine:
    """A LLaVA in training on this rank. Every rank must call every method at the same point."""

    def __init__(
        self,
        llava: "LlavaForConditionalGeneration",
        stage: StageName,
        training: Training,
        steps: int,
        device: torch.device,
    ) -> None:
        self._training, self._steps, self._device = training, steps, device
        self._dtype = DTYPES[training.precision]
        choose_trainable(llava, stage)
        if training.activation_checkpointing:
            llava.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        llava.train()
        llava.model.vision_tower.eval()
        self.llava = llava
        self._engine = _initialize(PackLoss(llava.to(device)), training, device)

    def step(self, number: int, packs: list[PackTensors], supervised: int) -> StepResult:
        """Forward and backward of this rank's packs, then one update. `supervised` counts tokens over all ranks."""
        started = time.monotonic()
        rate = learning_rate(number, self._steps, self._training)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self._device)
        for pack in packs:
            loss = self._engine(**vars(pack.to(self._device, self._dtype)))
            total += loss.detach()
            self._engine.backward(loss * (dist.get_world_size() / supervised), scale_wrt_gas=False)
        self._engine.step()
        dist.all_reduce(total)
        norm = self._engine.get_global_grad_norm()
        return StepResult(
            float(total) / supervised, None if norm is None else float(norm), rate, time.monotonic() - started
        )

    def save(self, folder: Path, cursor: int) -> None:
        """Write this rank's shard of a checkpoint; `cursor` is the next step. Frozen weights are left out."""
        self._engine.save_checkpoint(
            str(folder), tag=_TAG, client_state={}, save_latest=False, exclude_frozen_parameters=True
        )
        if dist.get_rank() == 0:
            (folder / _CURSOR).write_text(json.dumps({"step": cursor}))

    def load(self, folder: Path) -> int:
        """Restore weights, optimizer and cursor; returns the next step. Raises when any trained weight is missing."""
        loaded, _ = self._engine.load_checkpoint(
            str(folder), tag=_TAG, load_module_strict=False, custom_load_fn=_load_trained
        )
        if loaded is None:  # DeepSpeed only warns
            raise RunError(f"{folder}: holds no checkpoint that this run can load")
        return int(json.loads((folder / _CURSOR).read_text())["step"])

    def weights(self, only_trained: bool) -> dict[str, Tensor] | None:
        """The whole model's weights on the host of rank 0, by LlavaForConditionalGeneration's names; None elsewhere."""
        import deepspeed

        collected: dict[str, Tensor] = {}
        for name, parameter in self.llava.named_parameters():
            if only_trained and not parameter.requires_grad:
                continue
            with deepspeed.zero.GatheredParameters([parameter]):
                if dist.get_rank() == 0:
                    collected[name] = parameter.detach().to("cpu", copy=True)
        return collected if dist.get_rank() == 0 else None


def _initialize(module: nn.Module, training: Training, device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # before deepspeed is imported: it chooses once
    import deepspeed

    deepspeed.logger.setLevel(logging.WARNING)
    groups = list(_parameter_groups(module, training))
    optimizer = torch.optim.AdamW(groups, lr=training.lr, betas=training.betas, eps=training.epsilon)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=deepspeed_config(training), dist_init_required=False
    )
    return engine


def _parameter_groups(module: nn.Module, training: Training) -> Iterator[dict[str, Any]]:
    """Matrices decay, vectors (biases and norms) don't."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for decays in (True, False):
        chosen = [parameter for parameter in trained if (parameter.ndim >= 2) == decays]
        if chosen:
            yield {"params": chosen, "weight_decay": training.weight_decay if decays else 0.0}


def deepspeed_config(training: Training) -> dict[str, Any]:
    """DeepSpeed's own settings for one training stage.

    Accumulation is unmanaged: `backward` adds up, `step` reduces, so each step may have its own number of packs.
    """
    zero: dict[str, Any] = {"stage": training.zero.stage, "overlap_comm": False}
    if training.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if training.zero.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": training.clip_norm or 0.0,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: exact, and no compiler at run time
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 31,
    }


def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Put a checkpoint's weights into the module; strict in both directions for what trains."""
    wanted = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    if wanted != wanted & set(src):
        raise KeyError(f"the checkpoint lacks {sorted(wanted - set(src))[:3]}")
    _, unexpected = dst.load_state_dict(src, strict=False)
    if unexpected:
        raise KeyError(f"the checkpoint holds unknown weights {unexpected[:3]}")
