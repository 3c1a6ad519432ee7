"""DeepSpeed's checkpoint engine, replaced by one that writes files in the background, its op registry, and its import.

DeepSpeed passes the content of each checkpoint file to its checkpoint engine. This one copies the tensors to host
memory and writes the file from a thread, so that a training step waits for the copy only.

Importing this module imports DeepSpeed without two parts that raylava does not use and that take several seconds of
every rank's start: MLflow, for the autotuner, and torch's Inductor, which compiles the functions of the Muon optimizer.
"""

import logging
import os
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from raylava.compat.environment import environment_variable


@contextmanager
def _not_installed(package: str) -> Iterator[None]:
    """Make the package appear as not installed, unless it is imported already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # Python's marker for a module that cannot be imported
    try:
        yield
    finally:
        del sys.modules[package]


# torch.compile returns its function unchanged where TORCHDYNAMO_DISABLE is set.
with _not_installed("mlflow"), environment_variable("TORCHDYNAMO_DISABLE", "1"):
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer  # imported by DeepSpeed for any optimizer
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

# DeepSpeed 0.19 calls these in every step of ZeRO 3; Python 3.12 repeats the warning each time.
warnings.filterwarnings("ignore", r".*(all_gather_into|reduce_scatter)_tensor. is deprecated", FutureWarning)


class BackgroundWriter(CheckpointEngine):
    """A checkpoint engine whose `save` returns as soon as the content has been copied to host memory.

    Of a module's weights it saves those named in `trained`. DeepSpeed leaves out frozen weights too, but not a frozen
    embedding under its second name, the output layer: a gigabyte of Gemma in every connector checkpoint.
    """

    def __init__(self, trained: Collection[str]) -> None:
        super().__init__()
        self.name = "raylava"
        self._trained = trained
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._pending: list[Future[None]] = []

    def create(self, info: CheckpointCommitInfo) -> None:
        """Do nothing; part of DeepSpeed's interface."""

    def save(self, state_dict: Any, path: str) -> None:
        """Copy the content to host memory and schedule the write."""
        if isinstance(state_dict.get("module"), Mapping):
            weights = state_dict["module"].items()
            state_dict = {**state_dict, "module": {name: value for name, value in weights if name in self._trained}}
        self._pending.append(self._thread.submit(torch.save, _copy_to_host(state_dict), path))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Load a file that this recipe's own run wrote to its storage (DeepSpeed's files are pickles)."""
        return torch.load(path, map_location=map_location, weights_only=False)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Return True; a checkpoint becomes valid later, when the files of all ranks are uploaded."""
        return True

    def preserves_storage_sharing(self) -> bool:
        """Return False: the copies do not share storage, so DeepSpeed need not copy first."""
        return False

    def wait(self) -> None:
        """Wait until every scheduled file is written. Raises the exception of a failed write."""
        pending, self._pending = self._pending, []
        for write in pending:
            write.result()


def initialize(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any],
    writer: BackgroundWriter,
    device: torch.device,
) -> Any:
    """Return DeepSpeed's engine for the module on `device`; torch.distributed is initialized already.

    DeepSpeed takes the GPU that LOCAL_RANK names, whatever the module's; Ray's numbers of GPUs may differ from it.

    DeepSpeed's shared-memory kernel for CPUs is disabled: only inference calls it, and compiling it takes half a minute
    and a C++ compiler. Checkpoints are written by `writer`.
    """
    deepspeed.logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = os.environ.get("LOCAL_RANK", "0") if device.index is None else str(device.index)
    with environment_variable("LOCAL_RANK", local_rank):
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    assert device.type == "cpu" or engine.device == device, f"DeepSpeed took {engine.device} instead of {device}"
    engine.checkpoint_engine = writer
    for state in inner_optimizer(engine).state.values():
        state["step"].zero_()  # stage 0 in bf16 takes a step at rate 0 to allocate Adam's moments
    return engine


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return torch's optimizer of an engine, which the optimizers of ZeRO stages 1 to 3 wrap."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)  # type: ignore[no-any-return]


def full_fp32_weight(engine: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return the optimizer's fp32 value of a trained half-precision weight, whole. Called by all ranks.

    DeepSpeed's own function knows the optimizers of ZeRO stages 1 to 3 only.
    """
    if engine.zero_optimization_stage() == 0:
        weights, masters = (chain(*groups) for groups in (engine.optimizer.fp16_groups, engine.optimizer.fp32_groups))
        return next(master.detach() for weight, master in zip(weights, masters, strict=True) if weight is parameter)
    value = deepspeed.utils.safe_get_full_fp32_param(parameter)
    assert value is not None, "the optimizer has no fp32 value of a trained weight"
    return value


def _copy_to_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return type(value)((key, _copy_to_host(item)) for key, item in value.items())  # type: ignore[call-arg]
    if isinstance(value, list):
        return [_copy_to_host(item) for item in value]
    if type(value) is tuple:
        return tuple(_copy_to_host(item) for item in value)
    return value
