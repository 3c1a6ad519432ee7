"""The loss in chunks equals that of the whole logits, and no tensor has their size."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raylava.models.loss import LossHead
from raylava.perf import memory
from raylava.perf.memory import loss_chunk_rows

POSITIONS, WIDTH, ROWS, VOCABULARY = 64, 4, 40, 37
CHUNK = 10  # positions
GEMMA_VOCABULARY, GEMMA_BYTES = 256_000, 2 + 4  # a chunk's logits in fp32 and their gradient in bf16


class Inputs:
    """Random hidden states, output weight, labels and loss weights."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(POSITIONS, WIDTH, generator=generator).to(dtype).requires_grad_()
        self.weight = nn.Parameter(torch.randn(ROWS, WIDTH, generator=generator).to(dtype))
        self.labels = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
        self.loss_weights = torch.rand(POSITIONS, generator=generator)

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss and the gradients of hidden states and weight, by autograd from all logits at once."""
        logits = (self.hidden @ self.weight[:VOCABULARY].T).float()
        losses = nn.functional.cross_entropy(logits, self.labels, reduction="none")
        return self._differentiate((losses * self.loss_weights).sum())

    def chunked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same from LossHead."""
        return self._differentiate(LossHead(self.weight)(self.hidden, self.labels, self.loss_weights, VOCABULARY))

    def _differentiate(self, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return loss.detach(), *torch.autograd.grad(2.0 * loss, (self.hidden, self.weight))


class LargestTensor(TorchDispatchMode):
    """Records the largest number of values of a tensor that any operation returns, and the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0
        self.operations: set[str] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call the operation and look at its result."""
        result = func(*args, **(kwargs or {}))
        self.operations.add(str(func))
        if isinstance(result, Tensor):
            self.values = max(self.values, result.numel())
        return result


def set_chunk(patch: pytest.MonkeyPatch, rows: int) -> None:
    patch.setattr(memory, "_LOSS_CHUNK_BYTES", 4 * VOCABULARY * rows)


@given(rows=st.integers(1, POSITIONS + 1), seed=st.integers(0, 99))
def test_loss_and_gradients_equal_those_of_the_whole_logits(rows: int, seed: int) -> None:
    inputs = Inputs(seed)
    with pytest.MonkeyPatch.context() as patch:
        set_chunk(patch, rows)
        computed = inputs.chunked()
    for actual, expected in zip(computed, inputs.whole(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_loss_in_bf16_has_the_rounding_errors_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk(monkeypatch, CHUNK)
    exact, rounded = Inputs(dtype=torch.float32).whole(), Inputs(dtype=torch.bfloat16).chunked()
    for value, expected in zip(rounded, exact, strict=True):
        assert float((value.float() - expected).norm() / expected.norm()) < 2e-2


def test_no_tensor_has_the_size_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk(monkeypatch, CHUNK)
    with LargestTensor() as largest:
        Inputs().chunked()
    assert largest.values == CHUNK * VOCABULARY


def test_frozen_weight_gets_no_gradient_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk(monkeypatch, CHUNK)
    inputs = Inputs()
    inputs.weight.requires_grad_(False)
    with LargestTensor() as largest:
        LossHead(inputs.weight)(inputs.hidden, inputs.labels, inputs.loss_weights, VOCABULARY).backward()
    assert "aten.addmm_.default" not in largest.operations
    assert inputs.hidden.grad is not None


def test_loss_without_gradients_computes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk(monkeypatch, CHUNK)
    inputs = Inputs()
    with torch.no_grad(), LargestTensor() as largest:
        loss = LossHead(inputs.weight)(inputs.hidden, inputs.labels, inputs.loss_weights, VOCABULARY)
    assert not largest.operations & {"aten.addmm_.default", "aten.mm.out"}
    torch.testing.assert_close(loss, inputs.whole()[0])


def test_layer_without_labels_returns_logits() -> None:
    inputs = Inputs()
    assert torch.equal(LossHead(inputs.weight)(inputs.hidden), inputs.hidden @ inputs.weight.T)


def test_chunk_of_gemma_takes_less_than_a_gigabyte() -> None:
    assert 100 < loss_chunk_rows(GEMMA_VOCABULARY) < 1e9 / (GEMMA_VOCABULARY * GEMMA_BYTES)
