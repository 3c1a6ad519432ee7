"""Attention over packs: each sample of a row attends to itself alone, work Σ tᵢ² where a masked row does T².

transformers knows it as VARLEN once `register` was called; the same code on every device. Padding and caches have no
place here: this is for training on packs.
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
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample: (1, T, heads, head size) from (1, heads, T, head size) queries.

    `cu_seqlens` (samples + 1,) int32 on the host: where each sample starts, and T. Keys and values may have fewer
    heads. Dropout, which no model of raylava's registry uses, is not applied.
    """
    assert attention_mask is None, "a pack has no padding"
    heads = query.shape[1]
    lengths = cu_seqlens.diff().tolist()
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    attended = [
        scaled_dot_product_attention(q, _per_head(k, heads), _per_head(v, heads), is_causal=True, scale=scaling)
        for q, k, v in parts
    ]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def _per_head(shared: Tensor, heads: int) -> Tensor:
    """Keys or values for each query head; a view where all share one head, as in Gemma-2B."""
    own = shared.shape[1]
    if own == 1:
        return shared.expand(-1, heads, -1, -1)
    return shared if own == heads else shared.repeat_interleave(heads // own, dim=1)


def register() -> None:
    """Make VARLEN a name that models may be loaded with. It is never compiled: packs differ in the number of samples.

    Only here, as torch's compiler takes a second to import, in processes that have no model as well.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, torch.compiler.disable(varlen_attention))
