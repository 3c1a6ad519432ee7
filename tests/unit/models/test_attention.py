"""Variable-length attention: the kernel gets what the loop computes, and settings that it would ignore are refused."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRotaryEmbedding

from raylava.models.attention import VARLEN, has_varlen_kernel, kernel_attention, register_varlen, varlen_attention
from tests.support.fake_gpu import CUDA, fake_gpu

PACK = torch.rand(1, 2, 6, 4)
STARTS = torch.tensor([0, 2, 6], dtype=torch.int32)
KERNEL = "torch.nn.attention.varlen.varlen_attn"


def attend(**settings: Any) -> torch.Tensor:
    starts = {"cu_seqlens": STARTS, "device_cu_seqlens": STARTS}
    return varlen_attention(nn.Identity(), PACK, PACK, PACK, None, 0.5, **starts, **settings)[0]


@pytest.mark.parametrize("settings", [{"softcap": 50.0}, {"sliding_window": 8}, {"dropout": 0.1}], ids=str)
def test_setting_that_would_be_ignored_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=f"does not support {next(iter(settings))}, which Identity requests"):
        attend(**settings)


def test_settings_that_are_not_in_force_are_accepted() -> None:
    position_ids = torch.tensor([[0, 1, 0, 1, 2, 3]])
    result = attend(softcap=None, sliding_window=None, dropout=0.0, position_ids=position_ids, use_cache=False)
    assert torch.equal(result, attend())


@pytest.mark.parametrize(
    ("device", "dtype", "head_size", "capability", "expected"),
    [
        ("cuda", torch.bfloat16, 256, (9, 0), True),
        ("cuda", torch.float16, 64, (8, 0), True),
        ("cuda", torch.float32, 64, (9, 0), False),
        ("cuda", torch.float16, 64, (7, 5), False),
        ("cuda", torch.bfloat16, 288, (9, 0), False),
        ("cuda", torch.bfloat16, 20, (9, 0), False),
        ("cuda", torch.bfloat16, 208, (8, 6), False),
        ("cpu", torch.bfloat16, 64, (9, 0), False),
    ],
    ids=str,
)
def test_kernel_is_for_half_precision_on_gpus_of_its_capability(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    head_size: int,
    capability: tuple[int, int],
    expected: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert has_varlen_kernel(torch.device(device), dtype, head_size) is expected


def reference_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    longest: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """Compute what torch documents for its kernel, sample by sample, from the arguments alone."""
    assert window_size == (-1, 0)
    assert torch.equal(starts, key_starts)
    assert longest == longest_key == int(starts.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    outputs = []
    for start, stop in pairwise(starts.tolist()):
        rows = [states[start:stop].transpose(0, 1)[None] for states in (query, key, value)]
        attended = nn.functional.scaled_dot_product_attention(*rows, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def kernel_without_grouped_heads(query: Tensor, key: Tensor, value: Tensor, *args: Any, **settings: Any) -> Tensor:
    """The kernel of a release of torch without `enable_gqa`."""
    return reference_kernel(query, key, value, *args, **settings)


@pytest.mark.parametrize("kernel", [reference_kernel, kernel_without_grouped_heads])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_arguments_of_the_kernel_describe_the_attention_of_the_loop(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, kv_heads: int
) -> None:
    monkeypatch.setattr(KERNEL, kernel)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 6, 4, generator=generator) for heads in (4, kv_heads, kv_heads))
    starts = {"cu_seqlens": STARTS, "device_cu_seqlens": STARTS.clone()}
    expected, _ = varlen_attention(nn.Identity(), query, key, value, None, 0.3, **starts)
    torch.testing.assert_close(kernel_attention(query, key, value, *starts.values(), 0.3), expected)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices of the queries that torch's own kernel gets, on a GPU that this machine does not have."""
    from torch.nn.attention.varlen import varlen_attn

    calls: list[torch.device] = []

    def record(query: Tensor, *args: Any, enable_gqa: bool = False, **settings: Any) -> Any:
        calls.append(query.device)
        return varlen_attn(query, *args, enable_gqa=enable_gqa, **settings)

    monkeypatch.setattr(KERNEL, record)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return calls


def test_decoder_layer_on_a_gpu_calls_the_kernel_once(kernel_calls: list[torch.device]) -> None:
    """The device's tensors are fake: shapes, dtypes and devices are computed, and no value can be read."""
    register_varlen()
    config = GemmaConfig(
        hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=1, head_dim=16,
        num_hidden_layers=1, attn_implementation=VARLEN,
    )  # fmt: skip
    with torch.device("meta"):
        layer = GemmaDecoderLayer(config, layer_idx=0).bfloat16()
    with fake_gpu(), CUDA:
        weights = {name: torch.empty(weight.shape, dtype=weight.dtype) for name, weight in layer.named_parameters()}
        rotary = GemmaRotaryEmbedding(config)
        hidden = torch.empty(1, 6, 64, dtype=torch.bfloat16)
        positions = torch.empty(1, 6, dtype=torch.int64)
        arguments = {
            "position_ids": positions,
            "position_embeddings": rotary(hidden, positions),
            "cu_seqlens": STARTS,
            "device_cu_seqlens": torch.empty(3, dtype=torch.int32),
        }
        output = torch.func.functional_call(layer, weights, (hidden,), arguments)
    assert (output.shape, output.dtype, output.device) == (hidden.shape, torch.bfloat16, CUDA)
    assert kernel_calls == [CUDA]
