"""DeepSpeed's checkpoint files, written behind training's back: the step waits for the copy to the host, no longer.

DeepSpeed hands each file's content to its checkpoint engine; this one copies the tensors and lets a thread write.
"""

from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine


class BackgroundWriter(CheckpointEngine):
    """A checkpoint engine whose `save` returns as soon as the content is in host memory of its own.

    Of a module's weights it keeps those named in `trained`. DeepSpeed leaves frozen weights out too, but not a frozen
    embedding under its second name, the output layer's: a gigabyte of Gemma in every connector's checkpoint.
    """

    def __init__(self, trained: Collection[str]) -> None:
        super().__init__()
        self.name = "raylava"
        self._trained = trained
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._writing: list[Future[None]] = []

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to prepare."""

    def save(self, state_dict: Any, path: str) -> None:
        """Copy now, write soon."""
        if isinstance(state_dict.get("module"), Mapping):
            weights = state_dict["module"].items()
            state_dict = {**state_dict, "module": {name: value for name, value in weights if name in self._trained}}
        self._writing.append(self._thread.submit(torch.save, _copied(state_dict), path))

    def load(self, path: str, map_location: Any = None) -> Any:
        """A file that a run of this recipe wrote to its own storage (DeepSpeed's files are pickles)."""
        return torch.load(path, map_location=map_location, weights_only=False)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """What makes a checkpoint count is the upload of all ranks' files, later."""
        return True

    def preserves_storage_sharing(self) -> bool:
        """Copies share nothing, so DeepSpeed need not copy first."""
        return False

    def wait(self) -> None:
        """Return when all is written. Raises what a write raised."""
        writing, self._writing = self._writing, []
        for one in writing:
            one.result()


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return type(value)((key, _copied(inner)) for key, inner in value.items())  # type: ignore[call-arg]
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    if type(value) is tuple:
        return tuple(_copied(inner) for inner in value)
    return value
