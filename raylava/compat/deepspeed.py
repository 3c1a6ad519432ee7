"""DeepSpeed's checkpoint engine, replaced by one that writes files in the background, and its op registry.

DeepSpeed passes the content of each checkpoint file to its checkpoint engine. This one copies the tensors to host
memory and writes the file from a thread, so that a training step waits for the copy only.
"""

from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine


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


def disable_shm_comm_op() -> None:
    """Prevent DeepSpeed from compiling its shared-memory kernel on CPUs.

    Only inference calls it, and compiling takes half a minute and a C++ compiler.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


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
