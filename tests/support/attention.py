"""Counts how often attention is computed, by torch's scaled_dot_product_attention, with and without a mask."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class AttentionCalls(TorchFunctionMode):
    """A context that counts the calls: `masked` with a dense mask, `causal` without one."""

    def __init__(self) -> None:
        super().__init__()
        self.masked = self.causal = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Count the call, if it is one of attention, and make it."""
        settings = kwargs or {}
        if func is scaled_dot_product_attention:
            self.masked += settings.get("attn_mask") is not None
            self.causal += bool(settings.get("is_causal"))
        return func(*args, **settings)
