"""Search over execution configs: enumerate those that the constraints allow, predict each one, select the fastest.

Training resolves its `auto` settings here, `raylava estimate` builds its table here. All functions are pure.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from raylava.config.recipe import Training
from raylava.errors import UserError
from raylava.perf.memory import ExecutionConfig, MemoryBreakdown, TrainableModel, predict_memory
from raylava.perf.step_time import DeviceSpeed, StepTime, StepWorkload, step_time
from raylava.perf.traffic import Traffic, predict_traffic

_ZERO_STAGES = (0, 1, 2, 3)
_PACK_SIZES = (1024, 2048, 4096, 8192, 16_384, 32_768)
_RUNTIME_BYTES = 1.5e9  # CUDA context, NCCL buffers, cuBLAS workspace; published measurements are 1 to 2 GB
_FRAGMENTATION = 0.05  # fraction of the allocator's memory that is lost between blocks


@dataclass(frozen=True)
class DeviceBudget:
    """Resources of each worker: bytes of its device and of its share of the host (None if unknown), the number of
    workers, and the bandwidth between them in bytes/s.
    """

    device: float
    host: float | None
    world_size: int
    bandwidth: float


@dataclass(frozen=True)
class Candidate:
    """A config with its predicted memory, step time and traffic.

    `infeasible` is the reason why it does not fit and `warning` a reason to avoid it; both are empty if there is none.
    """

    config: ExecutionConfig
    memory: MemoryBreakdown
    seconds: StepTime
    traffic: Traffic
    infeasible: str
    warning: str


def usable_memory(memory: float) -> float:
    """Return the bytes of a GPU's memory that tensors can use, less the CUDA runtime and fragmentation."""
    return memory * (1 - _FRAGMENTATION) - _RUNTIME_BYTES


# 1. Enumerate


@dataclass(frozen=True)
class Constraint:
    """A rule for execution configs: `name` states it, `violated` returns whether a config breaks it."""

    name: str
    violated: Callable[[ExecutionConfig], bool]


_OFFLOAD_CONSTRAINTS = (
    Constraint(
        "DeepSpeed offloads the optimizer with ZeRO 1, 2 and 3",
        lambda config: config.offload_optimizer and config.zero_stage == 0,
    ),
    Constraint(
        "DeepSpeed offloads parameters with ZeRO 3",
        lambda config: config.offload_parameters and config.zero_stage != 3,
    ),
)
_COMPILE_CONSTRAINT = Constraint(
    "compiled models give wrong losses with the hooks of ZeRO 3",
    lambda config: config.zero_stage == 3,
)
# Limits what `raylava estimate` compares; a recipe may offload parameters alone.
_COMPARISON_CONSTRAINT = Constraint(
    "parameters are offloaded only together with the optimizer",
    lambda config: config.offload_parameters and not config.offload_optimizer,
)


@dataclass(frozen=True)
class SearchSpace:
    """The values of each setting that are combined, and the constraints on the combinations."""

    zero_stages: Sequence[int]
    offload_optimizer: Sequence[bool]
    offload_parameters: Sequence[bool]
    activation_checkpointing: Sequence[bool]
    pack_sizes: Sequence[int]
    constraints: Sequence[Constraint]

    def configs(self) -> Iterator[ExecutionConfig]:
        """Yield the combinations that violate no constraint. The order decides between equally fast configs."""
        combinations = itertools.product(
            self.zero_stages,
            self.offload_optimizer,
            self.activation_checkpointing,
            self.pack_sizes,
            self.offload_parameters,
        )
        for zero_stage, offload_optimizer, activation_checkpointing, pack_size, offload_parameters in combinations:
            config = ExecutionConfig(
                zero_stage, offload_optimizer, offload_parameters, activation_checkpointing, pack_size
            )
            if not any(constraint.violated(config) for constraint in self.constraints):
                yield config


def recipe_candidates(training: Training, longest: int) -> Iterator[ExecutionConfig]:
    """Yield the configs that a stage's settings allow: one if no setting is `auto`, none if the settings conflict.

    `longest` is the number of tokens of the longest sample.
    """
    zero, checkpointing = training.zero, training.activation_checkpointing
    # A ZeRO stage that is set explicitly is checked by the recipe.
    compiles = training.compile and zero.stage == "auto"
    return SearchSpace(
        zero_stages=_ZERO_STAGES if zero.stage == "auto" else (zero.stage,),
        offload_optimizer=(zero.offload_optimizer,),
        offload_parameters=(zero.offload_parameters,),
        activation_checkpointing=(False, True) if checkpointing == "auto" else (checkpointing,),
        pack_sizes=_pack_sizes(training.max_tokens_per_pack, longest),
        constraints=(*_OFFLOAD_CONSTRAINTS, _COMPILE_CONSTRAINT) if compiles else _OFFLOAD_CONSTRAINTS,
    ).configs()


def all_execution_configs(training: Training, longest: int) -> Iterator[ExecutionConfig]:
    """Yield the configs that `raylava estimate` compares, whether or not the recipe's settings allow them.

    `longest` is the number of tokens of the longest sample.
    """
    constraints = (*_OFFLOAD_CONSTRAINTS, _COMPARISON_CONSTRAINT)
    return SearchSpace(
        zero_stages=_ZERO_STAGES,
        offload_optimizer=(False, True),
        offload_parameters=(False, True),
        activation_checkpointing=(False, True),
        pack_sizes=sorted({*_pack_sizes("auto", longest), *_pack_sizes(training.max_tokens_per_pack, longest)}),
        constraints=(*constraints, _COMPILE_CONSTRAINT) if training.compile else constraints,
    ).configs()


def _pack_sizes(max_tokens_per_pack: int | Literal["auto"], longest: int) -> list[int]:
    """Return the pack sizes to consider: the one that is set, or all that hold the longest sample."""
    if max_tokens_per_pack != "auto":
        return [max_tokens_per_pack]
    return [size for size in _PACK_SIZES if size >= longest] or [longest]


# 2. Predict


def rank_candidates(
    configs: Iterable[ExecutionConfig],
    model: TrainableModel,
    workload: Callable[[int], StepWorkload],
    speed: DeviceSpeed,
    budget: DeviceBudget,
) -> list[Candidate]:
    """Predict memory, traffic and step time of each config, in the given order; `select` picks one of them.

    `workload` returns the workload of a step by the maximum tokens per pack; it is called once per value.
    """
    workload = cache(workload)
    return [_predict(config, model, workload(config.max_tokens_per_pack), speed, budget) for config in configs]


def _predict(
    config: ExecutionConfig, model: TrainableModel, workload: StepWorkload, speed: DeviceSpeed, budget: DeviceBudget
) -> Candidate:
    memory = predict_memory(model, config, workload.pack_shape, budget.world_size)
    traffic = predict_traffic(model, config, workload.packs, budget.world_size)
    return Candidate(
        config,
        memory,
        step_time(speed, workload, traffic, model, config, budget.world_size, budget.bandwidth),
        traffic,
        infeasible=_infeasible(memory, budget),
        warning=_warning(model, config, workload),
    )


def _infeasible(memory: MemoryBreakdown, budget: DeviceBudget) -> str:
    """Return why the memory exceeds the budget, or an empty string."""
    if memory.peak > budget.device:
        return f"{memory.peak / 1e9:.1f} GB in the {memory.peak_phase} phase, {budget.device / 1e9:.1f} GB usable"
    if budget.host is not None and memory.host > budget.host:
        return f"{memory.host / 1e9:.1f} GB on the host, {budget.host / 1e9:.1f} GB available"
    return ""


def _warning(model: TrainableModel, config: ExecutionConfig, workload: StepWorkload) -> str:
    """Return a warning if gradients lose precision: ZeRO 0 and 1 accumulate them in the weights' precision."""
    is_bf16 = model.bytes_per_value == 2
    accumulates = workload.max_packs > 1
    if is_bf16 and accumulates and config.zero_stage < 2:
        return "sums the gradients of packs in bf16"
    return ""


# 3. Select


def select(candidates: Sequence[Candidate]) -> Candidate:
    """Return the fastest candidate that fits without a warning; failing that, the fastest that fits; failing that, the
    one with the smallest peak memory.

    Raises UserError if there is no candidate, which means that the stage's settings conflict.
    """
    if not candidates:
        raise UserError(
            "no ZeRO stage supports these offload settings: the optimizer needs stage 1, 2 or 3, parameters need "
            "stage 3, and compile rules out stage 3; change zero.stage, zero.offload_optimizer or "
            "zero.offload_parameters"
        )
    feasible = [candidate for candidate in candidates if not candidate.infeasible]
    fastest = min(feasible, key=lambda candidate: candidate.seconds.total, default=None)
    return fastest_feasible(candidates) or fastest or min(candidates, key=lambda candidate: candidate.memory.peak)


def fastest_feasible(candidates: Iterable[Candidate]) -> Candidate | None:
    """Return the fastest candidate that fits without a warning, None if there is none.

    Among candidates whose step times differ by less than a microsecond, the one with the smallest peak memory wins.
    """
    feasible = [candidate for candidate in candidates if not candidate.infeasible and not candidate.warning]
    return min(feasible, key=lambda candidate: (round(candidate.seconds.total, 6), candidate.memory.peak), default=None)
