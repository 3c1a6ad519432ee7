"""Variable-length attention over packs: each sample attends to itself only, so work is Σ tᵢ² instead of T².

transformers knows the implementation as VARLEN after `register_varlen`. On GPUs of compute capability 8.0 or later, in
half precision, each layer calls torch's flash-attention kernel once for the whole pack; elsewhere it calls
scaled_dot_product_attention once per sample, which is the reference. VARLEN is for training on packs and supports
neither padding nor a KV cache.
"""

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

VARLEN = "varlen"
_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
_KERNEL_CAPABILITY = (8, 0)
# Multiples of 8 up to 256; some GPUs have no backward pass for more than 192 and up to 224.
_KERNEL_HEAD_SIZES = [size for size in range(8, 257, 8) if not 192 < size <= 224]
# Without cuDNN's attention, which compiles a plan for each new length.
_LOOP_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    cu_seqlens: Tensor,
    device_cu_seqlens: Tensor,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    use_cache: bool = False,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each sample of a pack.

    `query` is (1, heads, T, head size), `key` and `value` (1, KV heads, T, head size); the result is (1, T, heads, head
    size). `cu_seqlens`, (samples + 1,) int32 on the host, holds the start of each sample and T; `device_cu_seqlens` is
    its copy on the query's device. `position_ids` has been applied to query and key. Raises NotImplementedError for any
    other setting that is in force, such as dropout, a sliding window or a soft cap: ignoring it would train another
    model without a sign.
    """
    assert attention_mask is None, "a pack has no padding"
    assert not use_cache, "training keeps no KV cache"
    in_force = [name for name, value in (settings | {"dropout": dropout or None}).items() if value is not None]
    if in_force:
        raise NotImplementedError(
            f"{VARLEN} attention does not support {', '.join(in_force)}, which {type(module).__name__} requests; "
            "set attn_implementation: eager"
        )
    if has_varlen_kernel(query.device, query.dtype, query.shape[-1]):
        return kernel_attention(query, key, value, cu_seqlens, device_cu_seqlens, scaling), None
    return loop_attention(query, key, value, cu_seqlens, scaling), None


def has_varlen_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Return whether torch's variable-length kernel computes attention of this kind on the device."""
    return (
        device.type == "cuda"
        and dtype in _KERNEL_DTYPES
        and head_size in _KERNEL_HEAD_SIZES
        and torch.cuda.get_device_capability(device) >= _KERNEL_CAPABILITY
    )


def kernel_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, device_cu_seqlens: Tensor, scaling: float | None
) -> Tensor:
    """Compute `varlen_attention` by one call of torch's kernel. No value is read from the device."""
    from torch.nn.attention.varlen import varlen_attn  # takes a second to import, also in processes without a GPU

    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    settings: dict[str, Any] = {"window_size": (-1, 0), "scale": scaling}
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            settings["enable_gqa"] = True
        else:  # an older release of torch
            repeats = query.shape[1] // key.shape[1]
            key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    longest = longest_sample(cu_seqlens)
    starts = device_cu_seqlens
    output: Any = varlen_attn(query, key, value, starts, starts, longest, longest, **settings)
    return output[None]  # type: ignore[no-any-return]


def longest_sample(cu_seqlens: Tensor) -> int:
    """Return the length of the longest sample."""
    return int(np.diff(cu_seqlens.numpy()).max())


def loop_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float | None) -> Tensor:
    """Compute `varlen_attention` by one call of scaled_dot_product_attention per sample."""
    heads = query.shape[1]
    lengths = cu_seqlens.diff().tolist()
    samples = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    with sdpa_kernel(_LOOP_BACKENDS):
        outputs = [
            scaled_dot_product_attention(q, _repeat_kv(k, heads), _repeat_kv(v, heads), is_causal=True, scale=scaling)
            for q, k, v in samples
        ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


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
