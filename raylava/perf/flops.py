"""FLOPs of a training step, the numerator of model FLOPs utilization (MFU).

The count covers what the model requires, not what an implementation executes: recomputed activations and padding are
excluded (PaLM, Chowdhery et al. 2022, appendix B). Multiplying a token by a weight matrix costs 2 FLOPs per weight in
the forward pass, 2 for the gradient of the input if an earlier layer needs it, and 2 for the gradient of the weight if
the weight is trained. Element-wise work such as norms and activation functions is left out, as in
`torch.utils.flop_counter`. All functions are pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from raylava.perf.shapes import LanguageShape, LlavaShape, VisionShape


@dataclass(frozen=True)
class Flops:
    """FLOPs of one model part in the forward and the backward pass."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """FLOPs of both passes."""
        return self.forward + self.backward


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a step by model part. `body` is the language model without its output layer, `logits` is that layer."""

    vision: Flops
    connector: Flops
    body: Flops
    logits: Flops

    @property
    def total(self) -> float:
        """FLOPs of all parts in both passes."""
        return sum(part.total for part in (self.vision, self.connector, self.body, self.logits))


def step_flops(
    shape: LlavaShape,
    lengths: Sequence[int],
    images: int,
    loss_tokens: int,
    language: bool,
    vision: bool,
    causal: bool = True,
) -> StepFlops:
    """Return the FLOPs of one step.

    `lengths` holds the tokens of each sample with its images expanded, `images` and `loss_tokens` are totals over the
    step. `language` and `vision` say whether these parts train besides the connector: a frozen language model still
    propagates gradients to its input, a frozen vision tower runs forward only. Logits are computed at the
    `loss_tokens` positions only. Causal attention needs half the work; pass `causal=False` to count kernels that
    compute the full matrix.
    """
    return StepFlops(
        vision=_vision(shape.vision, images, vision),
        connector=_connector(shape, images, vision),
        body=_body(shape.language, lengths, language, causal),
        logits=_matmul_flops(2 * shape.language.embedding * loss_tokens, weight_grad=language),
    )


def _matmul_flops(forward: float, weight_grad: bool, input_grad: bool = True) -> Flops:
    """FLOPs of a matrix multiplication; each gradient that is computed costs as much as the forward pass."""
    gradients = [weight_grad, input_grad].count(True)
    return Flops(forward, forward * gradients)


def _vision(shape: VisionShape, images: int, trains: bool) -> Flops:
    patches = _matmul_flops(2 * shape.patch_matrix * shape.patches * images, trains, input_grad=False)
    blocks = _matmul_flops(2 * shape.matrices * shape.tokens * images, trains, input_grad=trains)
    attention = 4 * shape.layers * shape.width * shape.tokens**2 * images
    attention_backward = 2 * attention if trains else 0
    return Flops(
        forward=patches.forward + blocks.forward + attention,
        backward=patches.backward + blocks.backward + attention_backward,
    )


def _connector(shape: LlavaShape, images: int, vision_trains: bool) -> Flops:
    tokens = shape.vision.patches * images
    first = _matmul_flops(2 * shape.connector_in * tokens, weight_grad=True, input_grad=vision_trains)
    second = _matmul_flops(2 * shape.connector_out * tokens, weight_grad=True)
    return Flops(first.forward + second.forward, first.backward + second.backward)


def _body(shape: LanguageShape, lengths: Sequence[int], trains: bool, causal: bool) -> Flops:
    matrices = _matmul_flops(2 * shape.matrices * sum(lengths), trains)
    squared_lengths = sum(length * length for length in lengths)
    attention = (2 if causal else 4) * shape.layers * shape.attention_width * squared_lengths
    return Flops(matrices.forward + attention, matrices.backward + 2 * attention)
