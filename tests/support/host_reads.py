"""Records where values of tensors are read on the host: on a GPU, each such place waits for the device."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

import raylava

_READS = (
    Tensor.item,
    Tensor.tolist,
    Tensor.cpu,
    Tensor.numpy,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
    Tensor.nonzero,
    Tensor.masked_select,
)
_ROOT = Path(raylava.__file__).parents[1]


class HostReads(TorchFunctionMode):
    """A context that records reads by the module that asked for them, as `package/file.py:line function`, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Record the call, if it is a read, and make it."""
        if func in _READS:
            self.places.append(_caller())
        return func(*args, **(kwargs or {}))

    def of(self, package: str) -> list[str]:
        """Return the places in one package."""
        return [place for place in self.places if place.startswith(f"{package}/")]


def _caller() -> str:
    """Return the innermost place outside of torch and of this module."""
    frame = sys._getframe(2)
    while frame.f_back and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
        frame = frame.f_back
    file = frame.f_code.co_filename
    name = file.rpartition("site-packages/")[2] if "site-packages/" in file else str(Path(file).relative_to(_ROOT))
    return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
