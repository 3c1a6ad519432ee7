"""The output layer with its loss: cross-entropy in chunks of positions, so that no pack's logits exist as a whole.

Logits of 8,192 positions of Gemma take 8 GB in fp32. A chunk's logits become its loss and its gradients at once, and
only the gradients are kept, which have the sizes of the layer's input and weight (Hsu et al. 2024, Liger Kernel).
"""

from typing import Any

import torch
from torch import Tensor, nn

from raylava.perf.memory import loss_chunk_rows


class LossHead(nn.Linear):
    """The output layer of a language model, without bias, which computes the loss from its input if it is given labels.

    The loss is computed inside the layer's own call because ZeRO 3 has the weight whole only there.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        """Build the layer around a weight of shape (vocabulary, width), which it shares."""
        rows, width = weight.shape
        super().__init__(width, rows, bias=False, device="meta")
        self.weight = weight

    def forward(
        self,
        input: Tensor,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        vocabulary: int = 0,
    ) -> Tensor:
        """Return the logits of hidden states (…, width), or with `labels` the weighted sum of their cross-entropies.

        For a loss, `input` is (S, width), `labels` (S,) int64 and `loss_weights` (S,) fp32; the softmax is taken over
        the first `vocabulary` rows. The sum is a scalar in fp32.
        """
        if labels is None:
            return super().forward(input)
        assert loss_weights is not None, "a loss needs weights"
        arguments = (input, self.weight, labels, loss_weights, vocabulary, torch.is_grad_enabled())
        return _ChunkedCrossEntropy.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes gradients together with the loss; softmax and loss are computed in fp32.

    In half precision, logits and their gradients are rounded to it, as by autograd. The weight's gradient is also
    rounded after each chunk, and after each pack.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_weights: Tensor,
        vocabulary: int,
        differentiate: bool,
    ) -> Tensor:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        hidden_gradient = torch.empty_like(hidden) if differentiate and needs_hidden else None
        weight_gradient = torch.zeros_like(weight) if differentiate and needs_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        used = weight[:vocabulary]
        size = loss_chunk_rows(vocabulary)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            losses, gradient = _losses_and_gradient(hidden[rows] @ used.T, labels[rows], loss_weights[rows])
            loss += (losses * loss_weights[rows]).sum()
            if hidden_gradient is not None:
                torch.mm(gradient, used, out=hidden_gradient[rows])
            if weight_gradient is not None:
                weight_gradient[:vocabulary].addmm_(gradient.T, hidden[rows])
            del gradient  # before the next chunk's logits
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Scale the gradients by the loss's own, in place: each pack is differentiated once."""
        hidden, weight = (None if saved is None else saved.mul_(gradient) for saved in ctx.saved_tensors)
        return hidden, weight, None, None, None, None


def _losses_and_gradient(logits: Tensor, labels: Tensor, loss_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropies of (rows, vocabulary) logits in fp32, and the weighted sum's gradient by the logits.

    One fp32 tensor of the logits' size is allocated, and reused for each intermediate value. The gradient has the
    dtype of the logits.
    """
    positions, dtype = labels[:, None], logits.dtype
    values = logits.float()
    del logits
    values -= values.amax(dim=1, keepdim=True)
    chosen = values.gather(1, positions)
    sums = values.exp_().sum(dim=1, keepdim=True)
    losses = sums.log() - chosen
    values.div_(sums)  # now the probabilities
    values.scatter_add_(1, positions, torch.full_like(chosen, -1.0))
    return losses[:, 0], values.mul_(loss_weights[:, None]).to(dtype)
