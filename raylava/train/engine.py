"""DeepSpeed: build, step, save, load. Knows nothing of Ray, of blocks or of plans.

A step takes any number of packs: their summed losses, divided by the loss_tokens tokens of all ranks, are its loss.
DeepSpeed averages gradients over ranks, so each rank's loss is scaled up by the number of ranks first.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raylava.config.recipe import Training
from raylava.errors import RunError, first_line
from raylava.models.llava import CONNECTOR, VISION_TOWER, PackLoss, PackTensors, StageName, set_trainable
from raylava.perf.memory import REDUCE_BUCKET
from raylava.storage import StoragePath, storage_path

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_TAG = "state"  # one checkpoint folder holds one DeepSpeed tag
_CURSOR = "cursor.json"


@dataclass(frozen=True)
class StepResult:
    """One step over all ranks. `loss` is per supervised token; `seconds` are this rank's. `grad_norm` is
    before clipping, and None where DeepSpeed does not tell it (ZeRO stage 0 in fp32). `lr` is the language model's
    rate; `skipped` says that something was not finite and nothing was updated.
    """

    loss: float
    grad_norm: float | None
    lr: float
    seconds: float
    skipped: bool


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint holds: the state before `step`, of so many ranks at that ZeRO stage."""

    step: int
    world_size: int
    zero_stage: int


def read_checkpoint_meta(checkpoint: StoragePath) -> CheckpointMeta:
    """A checkpoint's cursor. Raises FileNotFoundError where there is none."""
    return CheckpointMeta(**json.loads((checkpoint / _CURSOR).read_bytes()))


def lr_multiplier(step: int, steps: int, training: Training) -> float:
    """The share of the peak rate at step `step` (from 0) of `steps`: linear warm-up over `warmup`·steps, then the
    schedule down to zero.
    """
    warmup = math.ceil(training.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if training.lr_schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if training.lr_schedule == "linear" else 1.0


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
        set_trainable(llava, stage, vision=training.vision_lr is not None)
        llava.train()
        llava.model.vision_tower.eval()
        self.llava = llava.to(device)
        assert "auto" not in (training.zero.stage, training.activation_checkpointing), "settle.py decides first"
        if training.activation_checkpointing:
            activation_checkpointing(llava)
        loss = PackLoss(llava)
        if training.compile:
            loss.compile(dynamic=True)  # in place: names stay those of the plain module
        self._engine = _initialize(loss, training, device)
        self._writer = self._engine.checkpoint_engine

    def step(self, number: int, packs: list[PackTensors], loss_tokens: int) -> StepResult:
        """Forward and backward of this rank's packs, then one update. `supervised` counts tokens over all ranks.

        When the loss or a gradient of any rank is not finite, no rank updates and the result says `skipped`.
        """
        started = time.monotonic()
        factor = self._set_lr(number)
        total = self._accumulate(packs, 1.0 / loss_tokens)
        finite = self._update(total)
        norm = self._engine.get_global_grad_norm()
        return StepResult(
            loss=float(total) / loss_tokens,
            grad_norm=None if norm is None else float(norm),
            lr=self._training.lr * factor,
            seconds=time.monotonic() - started,
            skipped=not finite,
        )

    def memory_dry_run(self, packs: list[PackTensors], advice: str) -> None:
        """Forward and backward of these packs, changing nothing: a step whose loss is made not finite is skipped.

        Raises RunError with `advice`, what to change, when memory does not do.
        """
        try:
            total = self._accumulate(packs, math.nan)
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise RunError(_out_of_memory(packs, error, advice)) from error
        finite = self._update(total * math.nan)
        assert not finite, "a memory dry run must not update"

    def _set_lr(self, number: int) -> float:
        factor = lr_multiplier(number, self._steps, self._training)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return factor

    def _accumulate(self, packs: list[PackTensors], scale: float) -> Tensor:
        """The summed losses of all ranks' packs; gradients of `scale` times that sum are left with DeepSpeed."""
        total = torch.zeros((), device=self._device)
        for pack in packs:
            loss = self._engine(**vars(pack.to(self._device, self._dtype)))
            total += loss.detach()
            self._engine.backward(loss * (dist.get_world_size() * scale), scale_wrt_gas=False)
        dist.all_reduce(total)
        return total

    def _update(self, total: Tensor) -> bool:
        """Update unless something is not finite anywhere; whether it was done.

        ZeRO 1 to 3 look through the gradients themselves. Stage 0 does not, so it is done here.
        """
        if self._training.zero.stage == 0 and not self._all_finite(total):
            self._engine.zero_grad()
            return False
        self._engine.step()
        return bool(self._engine.was_step_applied())

    def _all_finite(self, total: Tensor) -> bool:
        gradients = [weight.grad for weight in self._engine.module.parameters() if weight.grad is not None]
        bad = torch.stack([~torch.isfinite(value).all() for value in (total, *gradients)]).any().float()
        dist.all_reduce(bad, dist.ReduceOp.MAX)
        return not bad.item()

    def save(self, folder: Path, cursor: int) -> None:
        """Copy this rank's shard off the device and write it to `folder` in the background; see `written`.

        `cursor` is the next step. Frozen weights are left out.
        """
        self._engine.save_checkpoint(
            str(folder), tag=_TAG, client_state={}, save_latest=False, exclude_frozen_parameters=True
        )
        if dist.get_rank() == 0:
            about = CheckpointMeta(cursor, dist.get_world_size(), int(self._training.zero.stage))
            (folder / _CURSOR).write_text(json.dumps(asdict(about)))

    def wait_for_save(self) -> None:
        """Wait until all that was saved is on this node's disk. Raises what went wrong while writing."""
        self._writer.wait()

    def load(self, folder: Path) -> int:
        """Restore weights, optimizer and cursor; returns the next step. Raises when any trained weight is missing.

        A checkpoint of another world size is converted to DeepSpeed's universal format first.
        """
        about = read_checkpoint_meta(storage_path(folder))
        if about.zero_stage != self._training.zero.stage:
            raise RunError(
                f"{folder} was written with zero.stage={about.zero_stage} and this run has "
                f"zero.stage={self._training.zero.stage}; keep the stage until the run is done"
            )
        if about.world_size == dist.get_world_size() or self._training.zero.stage == 0:
            self._load(folder)
        else:
            with _universal(folder) as converted:
                self._load_universal(converted)
        return about.step

    def _load_universal(self, folder: Path) -> None:
        """DeepSpeed 0.19 at stage 3 gives all groups the first one's settings and one step counter, which each then
        advances; both are put right here.
        """
        groups = self._engine.optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        self._engine._config.load_universal_checkpoint = True
        self._load(folder)
        self._engine._config.load_universal_checkpoint = False
        for group, own in zip(self._engine.optimizer.param_groups, settings, strict=True):
            group.update(own)
        for state in self._engine.optimizer.optimizer.state.values():
            state["step"] = torch.as_tensor(state["step"]).clone()

    def _load(self, folder: Path) -> None:
        loaded, _ = self._engine.load_checkpoint(
            str(folder), tag=_TAG, load_module_strict=False, custom_load_fn=_load_trained
        )
        if loaded is None:  # DeepSpeed only warns
            raise RunError(f"{folder}: holds no checkpoint that this run can load")

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


def activation_checkpointing(llava: "LlavaForConditionalGeneration") -> None:
    """Keep each layer's input alone for the backward pass, and compute the rest again.

    transformers then has all embeddings require gradients, which only the reentrant kind needs: a frozen tower would
    keep its activations and be differentiated for nothing.
    """
    llava.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    llava.disable_input_require_grads()


def _out_of_memory(packs: list[PackTensors], error: BaseException, advice: str) -> str:
    largest = max(packs, key=lambda pack: pack.input_ids.shape[1])
    return (
        f"out of memory in the memory dry run of the largest packs (up to {largest.input_ids.shape[1]} tokens, "
        f"{largest.pixel_values.shape[0]} images): {advice} ({first_line(error)[:120]})"
    )


@contextmanager
def _universal(folder: Path) -> Iterator[Path]:
    """A checkpoint in DeepSpeed's universal format, which any world size can load; for as long as it is needed.

    The first rank of each node converts; the others wait. Done in a process of its own: it starts workers and prints.
    """
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"raylava-universal-{name}"
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", str(folder / _TAG), "--output_folder", str(target / _TAG)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(f"{folder}: cannot be converted for another world size: {done.stderr.strip()[-300:]}")
    dist.barrier()
    yield target
    dist.barrier()
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        shutil.rmtree(target, ignore_errors=True)


def _initialize(module: nn.Module, training: Training, device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # before deepspeed is imported: it chooses once
    import deepspeed

    from raylava.compat.deepspeed import BackgroundWriter

    deepspeed.logger.setLevel(logging.WARNING)
    # on CPUs it would compile a kernel, for half a minute and with a compiler that must be there, for inference alone
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    groups = list(parameter_groups(module, training))
    # foreach would hold intermediate values of all weights at once, at stage 0; the others have flat ones
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=training.betas, eps=training.eps, foreach=False)
    trained = {name: weight.numel() for name, weight in module.named_parameters() if weight.requires_grad}
    config = deepspeed_config(training, sum(trained.values()))
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    for state in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
        state["step"].zero_()  # stage 0 in bf16 has taken a step, at a rate of zero, to allocate Adam's moments
    engine.checkpoint_engine = BackgroundWriter(set(trained))
    return engine


def parameter_groups(module: nn.Module, training: Training) -> Iterator[dict[str, Any]]:
    """AdamW's groups, by peak rate (language model, connector, vision tower) and decay.

    Matrices decay, vectors (biases and norms) don't. Every group carries its `peak_lr`; `lr` is set with each step.
    """
    rates = {
        "connector": training.connector_lr or training.lr,
        "vision": training.vision_lr or training.lr,
        "language": training.lr,
    }
    trained = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
    for part, rate in rates.items():
        for decays in (True, False):
            chosen = [weight for name, weight in trained if _part(name) == part and (weight.ndim >= 2) == decays]
            if chosen:
                decay = training.weight_decay if decays else 0.0
                yield {"params": chosen, "weight_decay": decay, "lr": 0.0, "peak_lr": rate}


def _part(name: str) -> str:
    if CONNECTOR in name:
        return "connector"
    return "vision" if VISION_TOWER in name else "language"


def deepspeed_config(training: Training, trained: int) -> dict[str, Any]:
    """DeepSpeed's own settings for one training stage of so many `trained` parameters.

    Accumulation is unmanaged: `backward` adds up, `step` reduces, so each step may have its own number of packs.
    Buckets are no larger than what they hold: DeepSpeed's own take a gigabyte even where a connector alone trains.
    """
    zero: dict[str, Any] = {"stage": training.zero.stage, "overlap_comm": False}
    if training.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if training.zero.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    ours = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": training.max_grad_norm or 0.0,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: exact, and no compiler at run time
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 31,
    }
    given = training.deepspeed
    if training.precision == "bf16" and training.zero.stage in (
        2,
        3,
    ):  # a step's packs are summed in fp32; 0 and 1 can't
        given = {"data_types": {"grad_accum_dtype": "fp32"}} | given
    buckets = {"reduce_bucket_size": min(REDUCE_BUCKET, trained)}
    return {**given, **ours, "zero_optimization": {**buckets, **given.get("zero_optimization", {}), **zero}}


def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Put a checkpoint's weights into the module; strict in both directions for what trains."""
    wanted = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    if wanted != wanted & set(src):
        raise KeyError(f"the checkpoint lacks {sorted(wanted - set(src))[:3]}")
    _, unexpected = dst.load_state_dict(src, strict=False)
    if unexpected:
        raise KeyError(f"the checkpoint holds unknown weights {unexpected[:3]}")
