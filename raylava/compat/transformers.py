"""The private parts of transformers that raylava uses: which attention implementation a model runs."""

from typing import Any

from torch import nn


def attn_implementation(model: Any) -> str:
    """Return the name of the implementation by which a transformers model or layer computes attention.

    Attention layers look it up in their config at every call. There is a public way to set it
    (`set_attn_implementation`), but none to read it.
    """
    return str(model.config._attn_implementation)


def running_attn_implementations(model: nn.Module) -> set[str]:
    """Return the implementations that the attention layers inside a model run; more than one if they differ."""
    layers = [module for module in model.modules() if "Attention" in type(module).__name__]
    return {attn_implementation(layer) for layer in layers if hasattr(layer, "config")}
