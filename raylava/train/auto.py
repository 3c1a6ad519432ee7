"""Resolve a stage's `auto` settings to the fastest execution config that is predicted to fit on every worker.

Only settings that cannot change the result are resolved here; perf/search.py ranks the candidates.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from raylava.config.recipe import StageName, Training
from raylava.corpus.blocks import Lengths
from raylava.perf.hardware import Cluster, Device, device_from_cuda_name
from raylava.perf.memory import ExecutionConfig, TrainableModel
from raylava.perf.search import (
    Candidate,
    DeviceBudget,
    all_execution_configs,
    fastest_feasible,
    rank_candidates,
    recipe_candidates,
    select,
    usable_memory,
)
from raylava.perf.shapes import LlavaShape
from raylava.perf.step_time import DeviceSpeed, nominal_speed
from raylava.train.batch_plan import BatchPlan
from raylava.train.sampled_steps import SampledSteps, sample_steps

logger = logging.getLogger(__name__)

CPU_SPEED = DeviceSpeed(
    flops_per_s=1e11,
    s_per_pack=1e-2,
    s_per_step=0.0,
    s_per_parameter_update=1e-9,
    collective_latency_s=1e-4,
    source="order of magnitude of a CPU core",
)
_UNKNOWN_GPU_SPEED = DeviceSpeed(
    flops_per_s=5e13,
    s_per_pack=5e-3,
    s_per_step=0.0,
    s_per_parameter_update=1e-10,
    collective_latency_s=5e-5,
    source="order of magnitude of a GPU that is not in raylava's table",
)
HOST_MEMORY_FRACTION = 0.8  # of a host's free memory that workers may use
_CPU_BANDWIDTH = 1e9  # bytes/s between two processes over loopback
_UNKNOWN_GPU_BANDWIDTH = 1e10  # bytes/s between two GPUs over PCI Express
_SAMPLED_STEPS = 8


@dataclass(frozen=True)
class ResolvedTraining:
    """A stage's settings without `auto`, the candidate they correspond to, and advice for when memory runs out.

    `has_smaller` tells whether the `auto` settings allow a candidate that needs less memory.
    """

    training: Training
    candidate: Candidate
    advice: str
    has_smaller: bool


class AutoResolver:
    """Resolves the `auto` settings of one stage. Every rank must call it at the same point."""

    def __init__(
        self,
        stage: StageName,
        shape: LlavaShape,
        lengths: Lengths,
        plan: BatchPlan,
        device: torch.device,
    ) -> None:
        self._stage, self._shape, self._lengths, self._plan, self._device = stage, shape, lengths, plan, device
        self._budget = _smallest_budget(device)

    def resolve_auto(
        self,
        training: Training,
        saved_zero_stage: int | None = None,
        rejected: Sequence[ExecutionConfig] = (),
    ) -> ResolvedTraining:
        """Resolve the settings to a candidate that needs less memory than each of the rejected.

        The ZeRO stage of a checkpoint is kept, since no other stage can load it.
        """
        if training.zero.stage == "auto" and saved_zero_stage is not None:
            training = training.model_copy(
                update={"zero": training.zero.model_copy(update={"stage": saved_zero_stage})}
            )
        longest = int(self._lengths.length.max())
        candidates = _smaller_than(rejected, self._rank(recipe_candidates(training, longest), training))
        selected = self._broadcast_selection(candidates)
        logger.info("%s: %s; %s predicted", self._stage, selected.config.description, self._format_memory(selected))
        smaller = (
            candidate
            for candidate in self._rank(all_execution_configs(training, longest), training)
            if candidate.memory.peak < selected.memory.peak
        )
        return ResolvedTraining(
            _apply_config(training, selected.config),
            selected,
            self._advice(fastest_feasible(smaller)),
            has_smaller=any(candidate.memory.peak < selected.memory.peak for candidate in candidates),
        )

    def _broadcast_selection(self, candidates: list[Candidate]) -> Candidate:
        """Return rank 0's selection on all ranks, whose nodes may differ."""
        shared = [select(candidates).config]
        dist.broadcast_object_list(shared, device=self._device)
        return next(candidate for candidate in candidates if candidate.config == shared[0])

    def _rank(self, configs: Iterable[ExecutionConfig], training: Training) -> list[Candidate]:
        model, device = TrainableModel.of(self._shape, self._stage, training), _known_device(self._device)
        steps = SampledSteps(model, self._lengths, sample_steps(self._plan, _SAMPLED_STEPS), training.global_batch_size)
        speed = nominal_speed(device) if device else _unlisted_speed(self._device)
        return rank_candidates(configs, model, steps.workload(self._budget.world_size), speed, self._budget)

    def _format_memory(self, candidate: Candidate) -> str:
        return f"{candidate.memory.peak / 1e9:.2f} of {self._budget.device / 1e9:.2f} GB"

    def _advice(self, smaller: Candidate | None) -> str:
        """Describe the settings that are predicted to fit in less memory."""
        if smaller is None:
            return "no lower-memory configuration is predicted to fit; use more workers, or devices with more memory"
        config = smaller.config
        settings = {
            "zero.stage": config.zero_stage,
            "zero.offload_optimizer": str(config.offload_optimizer).lower(),
            "zero.offload_parameters": str(config.offload_parameters).lower(),
            "activation_checkpointing": str(config.activation_checkpointing).lower(),
            "max_tokens_per_pack": config.max_tokens_per_pack,
        }
        overrides = " ".join(f"{self._stage}.{key}={value}" for key, value in settings.items())
        return f"{overrides} should fit ({self._format_memory(smaller)} predicted)"


def _smaller_than(rejected: Sequence[ExecutionConfig], candidates: list[Candidate]) -> list[Candidate]:
    """Return the candidates that are predicted to need less memory than each of those that ran out of it."""
    peaks = [candidate.memory.peak for candidate in candidates if candidate.config in rejected]
    return [candidate for candidate in candidates if candidate.memory.peak < min(peaks)] if peaks else candidates


def _apply_config(training: Training, config: ExecutionConfig) -> Training:
    return training.model_copy(
        update={
            "zero": training.zero.model_copy(update={"stage": config.zero_stage}),
            "activation_checkpointing": config.activation_checkpointing,
            "max_tokens_per_pack": config.max_tokens_per_pack,
        }
    )


def _known_device(device: torch.device) -> Device | None:
    return device_from_cuda_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _unlisted_speed(device: torch.device) -> DeviceSpeed:
    """Return the speed by which candidates are ranked on a CPU or on a GPU without an entry in the table."""
    return _UNKNOWN_GPU_SPEED if device.type == "cuda" else CPU_SPEED


def _smallest_budget(device: torch.device) -> DeviceBudget:
    """Return the smallest memory budget of all ranks. Collective."""
    world_size, known = dist.get_world_size(), _known_device(device)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # set by torchrun and Ray Train
    host = psutil.virtual_memory().available * HOST_MEMORY_FRACTION / local_world_size
    device_memory = usable_memory(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else host
    smallest = torch.tensor([device_memory, host], dtype=torch.float64, device=device)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    nodes = -(-world_size // local_world_size)
    unlisted = _UNKNOWN_GPU_BANDWIDTH if device.type == "cuda" else _CPU_BANDWIDTH
    bandwidth = unlisted if known is None else Cluster(nodes, local_world_size, known).bandwidth
    return DeviceBudget(float(smallest[0]), float(smallest[1]), world_size, bandwidth)
