"""Runs code for a GPU on a machine without one: shapes, dtypes and devices are computed, values do not exist.

Reading a value raises torch's DataDependentOutputException, so that such code is proven not to wait for the GPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Within the context, tensors can be on CUDA; new ones are fake."""
    with FakeTensorMode(allow_non_fake_inputs=True), _MethodsByOperators():
        yield


class _MethodsByOperators(TorchFunctionMode):
    """Replaces methods that ask for a CUDA driver before a fake tensor is seen by the operators that they call."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, or operators in its place."""
        if func is Tensor.__getitem__ and args[0].device.type == "cuda":
            return _index(args[0], args[1])
        if func is Tensor.__setitem__ and args[0].device.type == "cuda":
            return _index(args[0], args[1]).copy_(args[2])
        if func is Tensor.contiguous and args[0].device.type == "cuda":
            return args[0].clone(memory_format=torch.contiguous_format)
        return func(*args, **(kwargs or {}))


def _index(tensor: Tensor, index: Any) -> Tensor:
    items = index if isinstance(index, tuple) else (index,)
    items = _without_ellipsis(items, tensor.dim())
    dimension, tensors = 0, []
    for item in items:
        if item is None:
            tensor = tensor.unsqueeze(dimension)
        elif isinstance(item, slice):
            tensor = torch.ops.aten.slice(tensor, dimension, item.start, item.stop, item.step or 1)
        elif isinstance(item, Tensor):
            tensors.append((dimension, item))
        else:
            tensor = tensor.select(dimension, item)
            continue
        dimension += 1
    if not tensors:
        return tensor
    positions: list[Tensor | None] = [None] * (1 + max(place for place, _ in tensors))
    for place, item in tensors:
        positions[place] = item
    return torch.ops.aten.index(tensor, positions)


def _without_ellipsis(items: tuple[Any, ...], dimensions: int) -> tuple[Any, ...]:
    for place, item in enumerate(items):
        if item is Ellipsis:
            named = sum(other is not None for other in items) - 1
            return (*items[:place], *[slice(None)] * (dimensions - named), *items[place + 1 :])
    return items
