"""Which way to train: every one that the settings leave open, weighed by memory and time; the cheapest that fits.

Training settles its `auto` settings here, `raylava estimate` its table. Pure functions.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from raylava.config.recipe import Training
from raylava.errors import UserError
from raylava.perf.memory import ExecutionConfig, Memory, TrainableModel, memory
from raylava.perf.step_time import JobSpec, Speed, StepSeconds, step_seconds
from raylava.perf.traffic import Traffic, traffic

_PACKS = (1024, 2048, 4096, 8192, 16_384, 32_768)
_CONTEXT = 1.5e9  # bytes of CUDA's context, NCCL's buffers and cuBLAS's workspace: measured by others at 1 to 2 GB
_FRAGMENTS = 0.05  # of the allocator's memory, lost between blocks


@dataclass(frozen=True)
class DeviceBudget:
    """What there is for each worker: bytes of its device and of its share of the host (None: not known), how many
    workers, and the bandwidth between them in bytes/s.
    """

    device: float
    host: float | None
    world_size: int
    bandwidth: float


@dataclass(frozen=True)
class Candidate:
    """A way, and what comes of it. `infeasible` is empty where it fits; `warning` where nothing speaks against it."""

    way: ExecutionConfig
    memory: Memory
    seconds: StepSeconds
    traffic: Traffic
    infeasible: str
    warning: str


def usable_memory(memory: float) -> float:
    """Of a GPU's memory, what tensors may take: the rest is the context's, or lost to fragmentation."""
    return memory * (1 - _FRAGMENTS) - _CONTEXT


def recipe_candidates(training: Training, longest: int) -> Iterator[ExecutionConfig]:
    """All that a recipe's stage leaves open; one where it says everything. `longest` sample in tokens."""
    automatic = [stage for stage in range(4) if not (training.compile and stage == 3)]
    zero = training.zero
    stages = automatic if zero.stage == "auto" else [zero.stage]
    activation_checkpointing = training.activation_checkpointing
    for stage, again, tokens in itertools.product(
        stages,
        [False, True] if activation_checkpointing == "auto" else [activation_checkpointing],
        _pack_sizes(training.max_tokens_per_pack, longest),
    ):
        if (zero.offload_parameters and stage < 3) or (zero.offload_optimizer and stage == 0):
            continue
        yield ExecutionConfig(stage, zero.offload_optimizer, zero.offload_parameters, again, tokens)


def all_execution_configs(training: Training, longest: int) -> Iterator[ExecutionConfig]:
    """Every way there is, whatever the recipe says of it: those that `raylava estimate` compares."""
    sizes = sorted({*_pack_sizes("auto", longest), *_pack_sizes(training.max_tokens_per_pack, longest)})
    for stage, offload, again, tokens in itertools.product(range(4), (False, True), (False, True), sizes):
        if not (offload and stage == 0) and not (training.compile and stage == 3):
            yield ExecutionConfig(stage, offload, False, again, tokens)
            if offload and stage == 3:
                yield ExecutionConfig(stage, True, True, again, tokens)


def _pack_sizes(tokens: int | Literal["auto"], longest: int) -> list[int]:
    if tokens != "auto":
        return [tokens]
    return [size for size in _PACKS if size >= longest] or [longest]


def rank_candidates(
    ways: Iterable[ExecutionConfig],
    model: TrainableModel,
    work: Callable[[int], JobSpec],
    speed: Speed,
    room: DeviceBudget,
) -> list[Candidate]:
    """What comes of each. `work` tells a step's work by the size of packs."""
    work = cache(work)
    return [_weighed(way, model, work(way.max_tokens_per_pack), speed, room) for way in ways]


def _weighed(way: ExecutionConfig, model: TrainableModel, work: JobSpec, speed: Speed, room: DeviceBudget) -> Candidate:
    held = memory(model, way, work.load, room.world_size)
    sent = traffic(model, way, work.packs, room.world_size)
    seconds = step_seconds(speed, work, sent, model, way, room.world_size, room.bandwidth)
    coarse = model.value == 2 and way.zero_stage < 2 and work.most_packs > 1
    warning = "sums the gradients of packs in bf16" if coarse else ""
    return Candidate(way, held, seconds, sent, _why_not(held, room), warning)


def _why_not(held: Memory, room: DeviceBudget) -> str:
    if held.peak > room.device:
        return f"{held.peak / 1e9:.1f} GB in the {held.at}, {room.device / 1e9:.1f} usable"
    if room.host is not None and held.host > room.host:
        return f"{held.host / 1e9:.1f} GB on the host, {room.host / 1e9:.1f} there"
    return ""


def select(options: Sequence[Candidate]) -> Candidate:
    """The cheapest; else the fastest that fits, in spite of a caution; else the one that holds least.

    Raises UserError where the settings leave none.
    """
    if not options:
        raise UserError("zero's offloading fits no ZeRO stage that is left (stage 0 has none, compile rules out 3)")
    fitting = [one for one in options if not one.infeasible]
    fastest = min(fitting, key=lambda one: one.seconds.total, default=None)
    return fastest_feasible(options) or fastest or min(options, key=lambda one: one.memory.peak)


def fastest_feasible(options: Iterable[Candidate]) -> Candidate | None:
    """Of those that fit and need no caution, the fastest; of equals what holds least. None where there is none."""
    fitting = [one for one in options if not one.infeasible and not one.warning]
    return min(fitting, key=lambda one: (round(one.seconds.total, 6), one.memory.peak), default=None)
