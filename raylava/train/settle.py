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

from raylava.corpus.blocks import Lengths
from raylava.cost.choose import Option, Room, all_ways, cheapest, open_ways, taken, usable, weigh
from raylava.cost.hardware import Cluster, Device, device_named
from raylava.cost.memory import Trained, Way
from raylava.cost.shapes import LlavaShape
from raylava.cost.speed import Speed, stated
from raylava.model.llava import StageName
from raylava.recipe import Training
from raylava.train.plan import EpochPlan
from raylava.train.work import Sampled, sampled

logger = logging.getLogger(__name__)

CPU_SPEED = Speed(flops=1e11, pack=1e-2, step=0.0, update=1e-9, latency=1e-4, source="a core's order of magnitude")
MEMORY_SHARE = 0.8  # of a host's free memory
_CPU_BANDWIDTH = 1e9  # bytes/s between two processes over loopback
_STEPS = 8  # looked at


@dataclass(frozen=True)
class Settled:
    """A stage's settings with nothing left open, what they come to, and what to say should memory not do."""

    training: Training
    option: Option
    advice: str


class Settler:
    """Weighs one stage; every rank must ask the same at the same point."""

    def __init__(
        self,
        stage: StageName,
        shape: LlavaShape,
        lengths: Lengths,
        plan: EpochPlan,
        device: torch.device,
    ) -> None:
        self._stage, self._shape, self._lengths, self._plan, self._device = stage, shape, lengths, plan, device
        self._room = _room(device)

    def settle(self, training: Training, kept_stage: int | None = None) -> Settled:
        """`kept_stage` is that of the checkpoint that the run goes on from, which only this one can read."""
        if training.zero.stage == "auto" and kept_stage is not None:
            training = _with(training, kept_stage, training.activation_checkpointing, training.pack_tokens)
        longest = int(self._lengths.length.max())
        chosen = self._agreed(self._weigh(open_ways(training, longest), training))
        logger.info("%s: %s; %s expected", self._stage, chosen.way.name, self._gigabytes(chosen))
        smaller = (
            one for one in self._weigh(all_ways(training, longest), training) if one.memory.peak < chosen.memory.peak
        )
        way = chosen.way
        return Settled(
            _with(training, way.zero_stage, way.recompute, way.pack_tokens), chosen, self._advice(cheapest(smaller))
        )

    def _agreed(self, options: list[Option]) -> Option:
        """What rank 0 takes: ranks may sit on unlike nodes, and must not part."""
        shared = [taken(options).way]
        dist.broadcast_object_list(shared, device=self._device)
        return next(one for one in options if one.way == shared[0])

    def _weigh(self, ways: Iterable[Way], training: Training) -> list[Option]:
        model, known = Trained.of(self._shape, self._stage, training), _known(self._device)
        steps = Sampled(model, self._lengths, sampled(self._plan, _STEPS), training.global_batch)
        return weigh(ways, model, steps.work(self._room.world_size), stated(known) if known else CPU_SPEED, self._room)

    def _gigabytes(self, option: Option) -> str:
        return f"{option.memory.peak / 1e9:.2f} of {self._room.device / 1e9:.2f} GB"

    def _advice(self, other: Option | None) -> str:
        if other is None:
            return "no way that holds less fits by the estimate: use more workers, or devices with more memory"
        way = other.way
        settings = {
            "zero.stage": way.zero_stage,
            "zero.offload_optimizer": str(way.offload_optimizer).lower(),
            "zero.offload_parameters": str(way.offload_parameters).lower(),
            "activation_checkpointing": str(way.recompute).lower(),
            "pack_tokens": way.pack_tokens,
        }
        told = " ".join(f"{self._stage}.{key}={value}" for key, value in settings.items())
        return f"{told} should fit ({self._gigabytes(other)} by the estimate)"


def _with(training: Training, stage: int | str, recompute: bool | str, pack_tokens: int | str) -> Training:
    zero = training.zero.model_copy(update={"stage": stage})
    return training.model_copy(update={"zero": zero, "activation_checkpointing": recompute, "pack_tokens": pack_tokens})


def _known(device: torch.device) -> Device | None:
    return device_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _room(device: torch.device) -> Room:
    """The least memory that any rank has."""
    world_size, found = dist.get_world_size(), _known(device)
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # torchrun and Ray Train say it
    host = psutil.virtual_memory().available * MEMORY_SHARE / neighbours
    own = usable(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else host
    least = torch.tensor([own, host], dtype=torch.float64, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    nodes = -(-world_size // neighbours)
    bandwidth = _CPU_BANDWIDTH if found is None else Cluster(nodes, neighbours, found).bandwidth
    return Room(float(least[0]), float(least[1]), world_size, bandwidth)
