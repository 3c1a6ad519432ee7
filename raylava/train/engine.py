"""The training engine: one optimizer step over any number of packs, checkpoints and weights, with DeepSpeed ZeRO.

The loss of a step is the sum over the packs of all ranks, whose loss tokens carry their weights. DeepSpeed averages
gradients over ranks, so each rank scales its loss by the world size. Independent of Ray, of blocks and of the plan.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raylava.compat.torch import is_compiled, is_out_of_memory
from raylava.compat.transformers import running_attn_implementations
from raylava.config.recipe import StageName, Training
from raylava.errors import RunError, first_line
from raylava.models.connector import CONNECTOR, VISION_TOWER, running_feature_factor
from raylava.models.llava import DTYPES, PackLoss, attn_mismatch, set_trainable
from raylava.models.packs import HostPack, LoadedPack
from raylava.perf.memory import REDUCE_BUCKET
from raylava.train.checkpoints import CHECKPOINT_TAG, loadable_meta, universal_checkpoint, write_checkpoint_meta

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from raylava.compat.deepspeed import BackgroundWriter


class DryRunOutOfMemoryError(RunError):
    """Memory ran out before the first step: while the engine was built, or in the memory dry run."""


@dataclass(frozen=True)
class StepResult:
    """The result of one step over all ranks.

    `loss` is the weighted mean over loss tokens, `lr` the learning rate of the last part that trains (the language
    model, if it does), `seconds` this rank's duration.
    `grad_norm` is before clipping, and None where DeepSpeed does not report it (ZeRO stage 0 in fp32). `skipped` means
    that the loss or a gradient was not finite and nothing was updated. `request` is the sum of the ranks' requests.
    """

    loss: float
    grad_norm: float | None
    lr: float
    seconds: float
    skipped: bool
    request: int


def lr_multiplier(step: int, steps: int, training: Training) -> float:
    """Return the fraction of the peak learning rate at `step` (counted from 0) of `steps`.

    The rate rises linearly over the first `warmup_ratio` · steps, from 0 or from the first step's share by
    `warmup_start`, then follows `lr_schedule` down to zero.
    """
    warmup = math.ceil(training.warmup_ratio * steps)
    if step < warmup:
        return (step if training.warmup_start == "zero" else step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if training.lr_schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if training.lr_schedule == "linear" else 1.0


class Engine:
    """A LLaVA model in training on this rank. Every rank must call every method at the same point.

    `first_step` is the step that the checkpoint continues with, 0 without one; `restore` loads the checkpoint.
    """

    def __init__(
        self,
        llava: "LlavaForConditionalGeneration",
        stage: StageName,
        training: Training,
        steps: int,
        device: torch.device,
        checkpoint: Path | None = None,
    ) -> None:
        """Build the engine for the checkpoint in a folder, if one is given.

        Raises RunError when the checkpoint does not fit the run.
        """
        self._training, self._steps, self._device = training, steps, device
        self._dtype = DTYPES[training.precision]
        set_trainable(llava, stage, vision=training.vision_lr is not None)
        llava.train()
        llava.model.vision_tower.eval()
        self.llava = llava.to(device)
        mismatch = attn_mismatch(llava, training.attn_implementation)
        assert not mismatch, mismatch
        assert "auto" not in (training.zero.stage, training.activation_checkpointing), "auto.py resolves these first"
        if training.activation_checkpointing:
            enable_activation_checkpointing(llava)
        self._loss = PackLoss(llava)
        if training.compile:
            for layer in llava.model.language_model.layers:
                layer.compile(dynamic=True)  # in place: names stay those of the plain module
        torch.use_deterministic_algorithms(training.deterministic)
        meta = None if checkpoint is None else loadable_meta(checkpoint, training)
        self._convert = meta is not None and meta.world_size != dist.get_world_size() and meta.zero_stage != 0
        groups = list(parameter_groups(self._loss, training))
        self._group_labels = [_label(group) for group in groups]  # before DeepSpeed divides the parameters among ranks
        self._engine, self._writer = _initialize(self._loss, groups, training, device, load_universal=self._convert)
        self._checkpoint = checkpoint
        self.first_step = 0 if meta is None else meta.step

    def prepare(self, pack: HostPack) -> LoadedPack:
        """Do what can be done for a pack before its step; called by the loader's threads."""
        return pack.prepare(self._device, self._dtype)

    def step(self, number: int, packs: Sequence[LoadedPack], request: int = 0) -> StepResult:
        """Compute this rank's packs and update once. The loss weights of all ranks' packs sum up to 1.

        `request` is a small number that is summed over ranks together with the loss, so that rank 0 can tell the others
        something without another collective. When the loss or a gradient of any rank is not finite, no rank updates
        and the result is marked `skipped`.
        """
        started = time.monotonic()
        self._set_lr(number)
        totals = self._accumulate(packs, request)
        finite, (loss, summed_request, _, *norm) = self._update(totals)
        return StepResult(
            loss=loss,
            grad_norm=norm[0] if norm else None,
            lr=self._engine.optimizer.param_groups[-1]["lr"],
            seconds=time.monotonic() - started,
            skipped=not finite,
            request=int(summed_request),
        )

    def mechanisms(self) -> dict[str, str]:
        """Describe what is in force, by mechanism; read from the initialized engine, not from the settings."""
        from raylava.compat.deepspeed import inner_optimizer

        engine, llava = self._engine, self.llava
        (language,) = running_attn_implementations(llava.model.language_model)
        (vision,) = running_attn_implementations(llava.model.vision_tower)
        configs = {"optimizer states": engine.zero_offload_optimizer(), "parameters": engine.zero_offload_param()}
        offloads = [name for name, config in configs.items() if config and config.device == "cpu"]
        groups = map(_describe_group, self._group_labels, engine.optimizer.param_groups)
        return {
            "attention": f"{language}, vision tower {vision}",
            "image features": f"× {running_feature_factor(llava):g}",
            "logits": self._loss.description(),
            "optimizer": f"{type(inner_optimizer(engine)).__name__}: {'; '.join(groups)}",
            "gradient clipping": f"norm {engine.gradient_clipping():g}" if engine.gradient_clipping() else "off",
            "compile": "on" if all(map(is_compiled, llava.model.language_model.layers)) else "off",
            "deterministic algorithms": "on" if torch.are_deterministic_algorithms_enabled() else "off",
            "activation checkpointing": "on" if llava.is_activation_checkpointing else "off",
            "ZeRO": f"stage {engine.zero_optimization_stage()}, {dist.get_world_size()} ranks",
            "offload": ", ".join(offloads) or "off",
            "overlap of communication": "on" if engine.zero_overlap_comm() else "off",
        }

    def memory_dry_run(self, packs: Sequence[LoadedPack], advice: str) -> None:
        """Compute these packs and an update at learning rate 0, then forget the optimizer's moments.

        No weight changes. To be called before `restore`. Raises DryRunOutOfMemoryError with `advice` where memory runs
        out.
        """
        from raylava.compat.deepspeed import inner_optimizer

        for group in self._engine.optimizer.param_groups:
            group["lr"] = 0.0
        try:
            self._update(self._accumulate(packs))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DryRunOutOfMemoryError(_out_of_memory(packs, error, advice)) from error
        for state in inner_optimizer(self._engine).state.values():
            for value in state.values():
                value.zero_()

    def _set_lr(self, number: int) -> None:
        factor = lr_multiplier(number, self._steps, self._training)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def _accumulate(self, packs: Sequence[LoadedPack], request: int = 0) -> Tensor:
        """Return the sums over ranks of the packs' loss, of `request` and of `_non_finite_values` (shape (3,), fp32).

        DeepSpeed accumulates the gradients.
        """
        total = torch.zeros((), device=self._device)
        for pack in packs:
            loss = self._engine(**vars(pack.to(self._device, self._dtype)))
            total += loss.detach()
            self._engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
        totals = torch.stack([total, torch.full_like(total, request), self._non_finite_values(total)])
        dist.all_reduce(totals)
        return totals

    def _non_finite_values(self, loss: Tensor) -> Tensor:
        """Return 1 if the loss or a gradient of this rank is not finite at ZeRO stage 0, else 0 (a scalar, fp32).

        ZeRO stages 1 to 3 check the gradients themselves.
        """
        if self._training.zero.stage != 0:
            return torch.zeros_like(loss)
        gradients = [weight.grad for weight in self._engine.module.parameters() if weight.grad is not None]
        return torch.stack([~torch.isfinite(value).all() for value in (loss, *gradients)]).any().float()

    def _update(self, totals: Tensor) -> tuple[bool, list[float]]:
        """Update unless a loss or gradient of any rank is not finite.

        Returns whether it was updated, and `totals` followed by the norm of the gradients if DeepSpeed has it. They are
        read from the device at once, which is the only time in a step that this class waits for the device.
        """
        values: list[float] | None = totals.tolist() if self._training.zero.stage == 0 else None
        if values and (values[2] or not math.isfinite(values[0])):
            self._engine.zero_grad()
            return False, values
        self._engine.step()
        updated, norm = bool(self._engine.was_step_applied()), self._engine.get_global_grad_norm()
        if values is None and isinstance(norm, Tensor):
            return updated, torch.cat([totals, norm.detach().reshape(1).to(totals)]).tolist()
        values = values or totals.tolist()
        return updated, values if norm is None else [*values, float(norm)]

    def save(self, folder: Path, next_step: int) -> None:
        """Copy this rank's shard to host memory and write it to `folder` in the background; see `wait_for_save`.

        Frozen weights are left out.
        """
        self._engine.save_checkpoint(
            str(folder), tag=CHECKPOINT_TAG, client_state={}, save_latest=False, exclude_frozen_parameters=True
        )
        if dist.get_rank() == 0:
            write_checkpoint_meta(folder, next_step, dist.get_world_size(), int(self._training.zero.stage))

    def wait_for_save(self) -> None:
        """Wait until every saved file is on this node's disk. Raises the exception of a failed write."""
        self._writer.wait()

    def restore(self) -> None:
        """Restore weights and optimizer, if there is a checkpoint; one of another world size is converted first.

        Raises RunError when the checkpoint cannot be loaded, KeyError when it lacks a trained weight.
        """
        if self._checkpoint is None:
            return
        if not self._convert:
            self._load(self._checkpoint)
            return
        with universal_checkpoint(self._checkpoint) as converted:
            self._load_universal(converted)

    def _load_universal(self, folder: Path) -> None:
        """Load a universal checkpoint.

        At stage 3, DeepSpeed 0.19 restores all parameter groups with the first one's settings and one shared step
        counter, which each group then increments; both are corrected here.
        """
        from raylava.compat.deepspeed import inner_optimizer

        groups = self._engine.optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        self._load(folder)
        for group, group_settings in zip(self._engine.optimizer.param_groups, settings, strict=True):
            group.update(group_settings)
        for state in inner_optimizer(self._engine).state.values():
            # The fused optimizer of GPUs reads the counter on the device; the file holds it on the host.
            state["step"] = torch.as_tensor(state["step"]).to(state["exp_avg"].device, torch.float32, copy=True)

    def _load(self, folder: Path) -> None:
        loaded, _ = self._engine.load_checkpoint(
            str(folder), tag=CHECKPOINT_TAG, load_module_strict=False, custom_load_fn=_load_trained
        )
        if loaded is None:  # DeepSpeed only warns
            raise RunError(f"{folder}: contains no checkpoint that this run can load")

    def weights(self, only_trained: bool) -> dict[str, Tensor] | None:
        """Gather the weights on the host of rank 0, by LlavaForConditionalGeneration's names; return None elsewhere.

        The connector, if it is trained, comes from the optimizer's fp32 weights: an export scales it.
        """
        weights: dict[str, Tensor] = {}
        for name, parameter in self.llava.named_parameters():
            if only_trained and not parameter.requires_grad:
                continue
            value = self._value_on_host(parameter, in_fp32=name.startswith(CONNECTOR) and parameter.requires_grad)
            if dist.get_rank() == 0:
                weights[name] = value
        return weights if dist.get_rank() == 0 else None

    def _value_on_host(self, parameter: nn.Parameter, in_fp32: bool) -> Tensor:
        """Return a copy of a parameter on the host, whole on rank 0. Called by all ranks."""
        import deepspeed

        from raylava.compat.deepspeed import full_fp32_weight

        if in_fp32 and parameter.dtype != torch.float32:
            return full_fp32_weight(self._engine, parameter).to("cpu", copy=True)
        with deepspeed.zero.GatheredParameters([parameter]):  # the value is whole within this block only
            return parameter.detach().to("cpu", copy=True) if dist.get_rank() == 0 else parameter.detach()


def enable_activation_checkpointing(llava: "LlavaForConditionalGeneration") -> None:
    """Recompute each layer's activations from its input in the backward pass.

    transformers makes embeddings require gradients for reentrant checkpointing; that is undone, since a frozen tower
    would otherwise keep its activations and be differentiated without need.
    """
    llava.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    llava.disable_input_require_grads()


def _out_of_memory(packs: Sequence[LoadedPack], error: BaseException, advice: str) -> str:
    largest = max(packs, key=lambda pack: pack.input_ids.shape[1])
    return (
        f"out of memory in the dry run of the worst-case packs (up to {largest.input_ids.shape[1]} tokens, "
        f"{largest.images} images): {advice} ({first_line(error)[:120]})"
    )


def _initialize(
    module: nn.Module, groups: list[dict[str, Any]], training: Training, device: torch.device, load_universal: bool
) -> "tuple[Any, BackgroundWriter]":
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # before deepspeed is imported: it chooses once
    from raylava.compat.deepspeed import BackgroundWriter, initialize

    # foreach would allocate intermediate values of all weights at once at stage 0; other stages use flat buffers
    fused = device.type == "cuda" and not training.zero.offload_optimizer
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=training.betas, eps=training.eps, foreach=False, fused=fused or None
    )
    trained = {name: weight.numel() for name, weight in module.named_parameters() if weight.requires_grad}
    config = deepspeed_config(training, sum(trained.values()), load_universal)
    writer = BackgroundWriter(set(trained))
    return initialize(module, optimizer, config, writer, device), writer


def parameter_groups(module: nn.Module, training: Training) -> Iterator[dict[str, Any]]:
    """Yield AdamW's parameter groups by part (language model, connector, vision tower) and weight decay.

    Matrices decay; vectors (biases and norms) do not. Each group has its `peak_lr` and `part`;
    `lr` is set at every step.
    """
    rates = {
        "connector": training.connector_lr or training.lr,
        "vision": training.vision_lr or training.lr,
        "language": training.lr,
    }
    trained = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
    for part, rate in rates.items():
        for decays in (True, False):
            weights = [weight for name, weight in trained if _part(name) == part and (weight.ndim >= 2) == decays]
            if weights:
                decay = training.weight_decay if decays else 0.0
                yield {"params": weights, "weight_decay": decay, "lr": 0.0, "peak_lr": rate, "part": part}


def _label(group: dict[str, Any]) -> str:
    return f"{group['part']} {sum(weight.numel() for weight in group['params']):,} values"


def _describe_group(label: str, group: dict[str, Any]) -> str:
    decay = f", weight decay {group['weight_decay']:g}" if group["weight_decay"] else ""
    return f"{label} at {group['peak_lr']:g}{decay}"


def _part(name: str) -> str:
    if CONNECTOR in name:
        return "connector"
    return "vision" if VISION_TOWER in name else "language"


def deepspeed_config(training: Training, trained: int, load_universal: bool = False) -> dict[str, Any]:
    """Return the DeepSpeed config of a training stage with `trained` trainable parameters.

    With `load_universal`, DeepSpeed expects its universal format in every checkpoint that the engine loads.

    Gradient accumulation is unmanaged: `backward` accumulates and `step` reduces, so the number of packs may differ
    between steps. Buckets are no larger than the trainable parameters; DeepSpeed's default takes a gigabyte even for a
    connector.
    """
    zero: dict[str, Any] = {"stage": training.zero.stage, "overlap_comm": False}
    if training.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if training.zero.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    fixed = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": training.max_grad_norm or 0.0,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW needs no compiler at run time
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 31,
        "checkpoint": {"load_universal": load_universal},
    }
    user = {"timers": {"throughput": {"enabled": False}}} | training.deepspeed  # they wait in every forward pass
    if training.precision == "bf16" and training.zero.stage in (2, 3):  # accumulate packs in fp32; 0 and 1 cannot
        user = {"data_types": {"grad_accum_dtype": "fp32"}} | user
    buckets = {"reduce_bucket_size": min(REDUCE_BUCKET, trained)}
    return {**user, **fixed, "zero_optimization": {**buckets, **user.get("zero_optimization", {}), **zero}}


def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Load a checkpoint's weights into the module; missing or unknown trainable weights raise KeyError."""
    wanted = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    if wanted != wanted & set(src):
        raise KeyError(f"the checkpoint lacks the weights {sorted(wanted - set(src))[:3]}")
    _, unexpected = dst.load_state_dict(src, strict=False)
    if unexpected:
        raise KeyError(f"the checkpoint has unknown weights {unexpected[:3]}")
