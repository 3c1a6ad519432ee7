"""A stage's `auto` settings → the fastest that its workers' memory admits, by cost/choose.py; all ranks alike.

Only settings that leave the result as it is are ever chosen here.
"""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from raylava.config.recipe import Training
from raylava.corpus.blocks import Lengths
from raylava.models.llava import StageName
from raylava.perf.hardware import Cluster, Device, device_named
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
from raylava.perf.step_time import Speed, nominal_speed
from raylava.train.batch_plan import BatchPlan
from raylava.train.sampled_steps import SampledSteps, sample_steps

logger = logging.getLogger(__name__)

CPU_SPEED = Speed(flops=1e11, pack=1e-2, step=0.0, update=1e-9, latency=1e-4, source="a core's order of magnitude")
MEMORY_SHARE = 0.8  # of a host's free memory
_CPU_BANDWIDTH = 1e9  # bytes/s between two processes over loopback
_STEPS = 8  # looked at


@dataclass(frozen=True)
class ResolvedTraining:
    """A stage's settings with nothing left open, what they come to, and what to say should memory not do."""

    training: Training
    option: Candidate
    advice: str


class AutoResolver:
    """Weighs one stage; every rank must ask the same at the same point."""

    def __init__(
        self,
        stage: StageName,
        shape: LlavaShape,
        lengths: Lengths,
        plan: BatchPlan,
        device: torch.device,
    ) -> None:
        self._stage, self._shape, self._lengths, self._plan, self._device = stage, shape, lengths, plan, device
        self._room = _room(device)

    def resolve_auto(self, training: Training, kept_stage: int | None = None) -> ResolvedTraining:
        """`kept_stage` is that of the checkpoint that the run goes on from, which only this one can read."""
        if training.zero.stage == "auto" and kept_stage is not None:
            training = _with(training, kept_stage, training.activation_checkpointing, training.max_tokens_per_pack)
        longest = int(self._lengths.length.max())
        chosen = self._agreed(self._weigh(recipe_candidates(training, longest), training))
        logger.info("%s: %s; %s expected", self._stage, chosen.way.name, self._gigabytes(chosen))
        smaller = (
            one
            for one in self._weigh(all_execution_configs(training, longest), training)
            if one.memory.peak < chosen.memory.peak
        )
        way = chosen.way
        return ResolvedTraining(
            _with(training, way.zero_stage, way.activation_checkpointing, way.max_tokens_per_pack),
            chosen,
            self._advice(fastest_feasible(smaller)),
        )

    def _agreed(self, options: list[Candidate]) -> Candidate:
        """What rank 0 takes: ranks may sit on unlike nodes, and must not part."""
        shared = [select(options).way]
        dist.broadcast_object_list(shared, device=self._device)
        return next(one for one in options if one.way == shared[0])

    def _weigh(self, ways: Iterable[ExecutionConfig], training: Training) -> list[Candidate]:
        model, known = TrainableModel.of(self._shape, self._stage, training), _known(self._device)
        steps = SampledSteps(model, self._lengths, sample_steps(self._plan, _STEPS), training.global_batch_size)
        return rank_candidates(
            ways, model, steps.work(self._room.world_size), nominal_speed(known) if known else CPU_SPEED, self._room
        )

    def _gigabytes(self, option: Candidate) -> str:
        return f"{option.memory.peak / 1e9:.2f} of {self._room.device / 1e9:.2f} GB"

    def _advice(self, other: Candidate | None) -> str:
        if other is None:
            return "no way that holds less fits by the estimate: use more workers, or devices with more memory"
        way = other.way
        settings = {
            "zero.stage": way.zero_stage,
            "zero.offload_optimizer": str(way.offload_optimizer).lower(),
            "zero.offload_parameters": str(way.offload_parameters).lower(),
            "activation_checkpointing": str(way.activation_checkpointing).lower(),
            "max_tokens_per_pack": way.max_tokens_per_pack,
        }
        told = " ".join(f"{self._stage}.{key}={value}" for key, value in settings.items())
        return f"{told} should fit ({self._gigabytes(other)} by the estimate)"


def _with(
    training: Training, stage: int | str, activation_checkpointing: bool | str, max_tokens_per_pack: int | str
) -> Training:
    zero = training.zero.model_copy(update={"stage": stage})
    return training.model_copy(
        update={
            "zero": zero,
            "activation_checkpointing": activation_checkpointing,
            "max_tokens_per_pack": max_tokens_per_pack,
        }
    )


def _known(device: torch.device) -> Device | None:
    return device_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _room(device: torch.device) -> DeviceBudget:
    """The least memory that any rank has."""
    world_size, found = dist.get_world_size(), _known(device)
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # torchrun and Ray Train say it
    host = psutil.virtual_memory().available * MEMORY_SHARE / neighbours
    own = usable_memory(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else host
    least = torch.tensor([own, host], dtype=torch.float64, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    nodes = -(-world_size // neighbours)
    bandwidth = _CPU_BANDWIDTH if found is None else Cluster(nodes, neighbours, found).bandwidth
    return DeviceBudget(float(least[0]), float(least[1]), world_size, bandwidth)
