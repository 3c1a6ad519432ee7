"""A stage's `auto` settings → the cheapest that this cluster's memory admits, by cost/choose.py; all ranks alike.

Only settings that leave the result as it is are ever chosen here.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import psutil
import torch
import torch.distributed as dist

from raylava.corpus.blocks import Lengths
from raylava.cost.choose import Option, Room, all_ways, cheapest, open_ways, usable, weigh
from raylava.cost.flops import step_flops
from raylava.cost.hardware import Cluster, Device, device_named
from raylava.cost.memory import Load, Trained, Way
from raylava.cost.shapes import LlavaShape
from raylava.cost.speed import Speed, Work, stated
from raylava.model.llava import StageName
from raylava.recipe import Training
from raylava.train.plan import Pack, largest_packs

logger = logging.getLogger(__name__)

CPU_SPEED = Speed(flops=1e11, pack=1e-2, step=0.0, update=1e-9, latency=1e-4, source="a CPU core's order of magnitude")
_CPU_BANDWIDTH = 1e9  # bytes/s between two processes over loopback
MEMORY_SHARE = 0.8  # of a host's free memory


@dataclass(frozen=True)
class Settled:
    """A stage's settings with nothing left open, what they come to, and what to say should memory not do."""

    training: Training
    option: Option
    advice: str


class Settler:
    """Weighs one stage on this rank's device; every rank must ask the same."""

    def __init__(
        self, stage: StageName, shape: LlavaShape, lengths: Lengths, device: torch.device, world_size: int
    ) -> None:
        self._stage, self._shape, self._lengths, self._device = stage, shape, lengths, device
        self._room = _room(device, world_size)

    def settle(self, training: Training, kept_stage: int | None = None) -> Settled:
        """`kept_stage` is that of the checkpoint that the run goes on from, which only this one can read."""
        if training.zero.stage == "auto" and kept_stage is not None:
            training = _with(training, kept_stage, training.activation_checkpointing, training.pack_tokens)
        model, longest = Trained.of(self._shape, self._stage, training), int(self._lengths.length.max())
        weighed = self._weigh(open_ways(training, longest), model, training)
        chosen = cheapest(weighed) or min(weighed, key=lambda one: one.memory.peak)
        way = chosen.way
        settled = _with(training, way.zero_stage, way.recompute, way.pack_tokens)
        logger.info("%s: %s; %.2f GB of %.2f expected", self._stage, way.name, *self._gigabytes(chosen))
        other = cheapest(one for one in self._weigh(all_ways(training, longest), model, training) if one.way != way)
        return Settled(settled, chosen, self._advice(other))

    def _weigh(self, ways: Iterable[Way], model: Trained, training: Training) -> list[Option]:
        found = _known(self._device)
        return weigh(ways, model, self._work(model, training), stated(found) if found else CPU_SPEED, self._room)

    def _work(self, model: Trained, training: Training) -> Callable[[int], Work]:
        lengths, world_size = self._lengths, self._room.world_size
        share = training.global_batch / len(lengths) / world_size  # of the corpus, in a rank's step
        spread = [int(length) for length in np.quantile(lengths.length, np.linspace(0.005, 0.995, 100))]
        images, supervised = (int(part.mean() * 100) for part in (lengths.images, lengths.supervised))
        flops = step_flops(self._shape, spread, images, supervised, model.language, model.vision)
        samples = training.global_batch / world_size / 100

        def work(pack_tokens: int) -> Work:
            tokens = float(lengths.length.sum()) * share
            packs = max(1.0, np.ceil(tokens / pack_tokens))
            load = fullest(lengths, pack_tokens, training.global_batch)
            return Work(load, packs, flops.total * samples, flops.body.forward * samples, images * samples)

        return work

    def _gigabytes(self, option: Option) -> tuple[float, float]:
        return option.memory.peak / 1e9, self._room.device / 1e9

    def _advice(self, other: Option | None) -> str:
        if other is None:
            return "no other way fits by the estimate either: use more workers, or devices with more memory"
        way = other.way
        settings = {
            "zero.stage": way.zero_stage,
            "zero.offload_optimizer": str(way.offload_optimizer).lower(),
            "activation_checkpointing": str(way.recompute).lower(),
            "pack_tokens": way.pack_tokens,
        }
        told = " ".join(f"{self._stage}.{key}={value}" for key, value in settings.items())
        gigabytes, room = self._gigabytes(other)
        return f"{told} should fit ({gigabytes:.1f} of {room:.1f} GB by the estimate)"


def fullest(lengths: Lengths, pack_tokens: int, samples: int) -> Load:
    """What no pack of `pack_tokens` exceeds, in each respect."""
    packs = largest_packs(lengths, pack_tokens, samples)

    def most(what: "np.ndarray[tuple[int], np.dtype[np.int32]]") -> int:
        return max(_sum(what, pack) for pack in packs)

    return Load(most(lengths.length), most(lengths.supervised), max(1, most(lengths.images)))


def _sum(what: "np.ndarray[tuple[int], np.dtype[np.int32]]", pack: Pack) -> int:
    return int(what[list(pack)].sum())


def _with(training: Training, stage: "int | str", recompute: "bool | str", pack_tokens: "int | str") -> Training:
    zero = training.zero.model_copy(update={"stage": stage})
    return training.model_copy(update={"zero": zero, "activation_checkpointing": recompute, "pack_tokens": pack_tokens})


def _known(device: torch.device) -> Device | None:
    return device_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _room(device: torch.device, world_size: int) -> Room:
    """The least that any rank has, so that all choose the same."""
    host = psutil.virtual_memory().available * MEMORY_SHARE / world_size
    own = usable(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else host
    least = torch.tensor([own, host], dtype=torch.float64, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    found = _known(device)
    local = torch.cuda.device_count() if device.type == "cuda" else world_size
    nodes = -(-world_size // max(1, local))
    bandwidth = _CPU_BANDWIDTH if found is None else Cluster(nodes, local, found).bandwidth
    return Room(float(least[0]), float(least[1]), world_size, bandwidth)
