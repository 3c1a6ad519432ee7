"""The private parts of transformers that raylava uses: which attention implementation a model runs."""

from typing import Any


def attn_implementation(model: Any) -> str:
    """Return the name of the implementation by which a transformers model or layer computes attention.

    Attention layers look it up in their config at every call. There is a public way to set it
    (`set_attn_implementation`), but none to read it.
    """
    return str(model.config._attn_implementation)
