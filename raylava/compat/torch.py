"""What raylava needs of torch without a public interface: compiled modules, and errors by their text."""

import torch
from torch import nn

_ALLOCATION_FAILURES = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")


def is_compiled(module: nn.Module) -> bool:
    """Return whether `module.compile()` was called: torch keeps the compiled call beside the module's own."""
    return module._compiled_call_impl is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on the device, on the host or in a library such as cuBLAS or NCCL.

    An illegal access to memory is another error, after which the device can no longer be used.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(failure in text for failure in _ALLOCATION_FAILURES)
