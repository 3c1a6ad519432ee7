"""Variable-length attention over packs: each sample attends to itself only, so work is Σ tᵢ² instead of T².

transformers knows the implementation as VARLEN after `register_varlen`; the same code runs on every device. It is for
training on packs and supports neither padding nor a KV cache.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

VARLEN = "varlen"


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    cu_seqlens: Tensor,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    use_cache: bool = False,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each sample of a pack.

    `query` is (1, heads, T, head size), `key` and `value` (1, KV heads, T, head size); the result is (1, T, heads, head
    size). `cu_seqlens`, (samples + 1,) int32 on the host, holds the start of each sample and T. `position_ids` has been
    applied to query and key. Raises NotImplementedError for any other setting that is in force, such as dropout, a
    sliding window or a soft cap: ignoring it would train another model without a sign.
    """
    assert attention_mask is None, "a pack has no padding"
    assert not use_cache, "training keeps no KV cache"
    in_force = [name for name, value in (settings | {"dropout": dropout or None}).items() if value is not None]
    if in_force:
        raise NotImplementedError(
            f"{VARLEN} attention does not support {', '.join(in_force)}, which {type(module).__name__} requests; "
            "set attn_implementation: eager"
        )
    heads = query.shape[1]
    lengths = cu_seqlens.diff().tolist()
    samples = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    outputs = [
        scaled_dot_product_attention(q, _repeat_kv(k, heads), _repeat_kv(v, heads), is_causal=True, scale=scaling)
        for q, k, v in samples
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _repeat_kv(states: Tensor, heads: int) -> Tensor:
    """Repeat key or value heads for all query heads; a view where there is one KV head, as in Gemma 2B."""
    kv_heads = states.shape[1]
    if kv_heads == 1:
        return states.expand(-1, heads, -1, -1)
    return states if kv_heads == heads else states.repeat_interleave(heads // kv_heads, dim=1)


def register_varlen() -> None:
    """Register VARLEN with transformers. It is excluded from torch.compile: the number of samples varies by pack.

    `torch.compiler` is used inside the function because importing it takes a second, also in processes without a model.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, torch.compiler.disable(varlen_attention))
