"""The private parts of torch that raylava uses: whether a module has been compiled."""

from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Return whether `module.compile()` was called: torch keeps the compiled call beside the module's own."""
    return module._compiled_call_impl is not None
