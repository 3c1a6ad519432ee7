"""The arithmetic of a training step: what model FLOPs utilisation (MFU) is made of.

Counted is what the model needs, not what an implementation spends: recomputed activations and padding count nothing
(PaLM, Chowdhery et al. 2022, appendix B). A multiplication by a weight costs 2 FLOPs a token forward, 2 for the
gradient of its input where something before it learns, and 2 for its own where it learns. Norms, activations and other
element-wise work are left out, as `torch.utils.flop_counter` does. Pure functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from raylava.perf.shapes import LanguageShape, LlavaShape, VisionShape


@dataclass(frozen=True)
class Flops:
    """Forward and backward, of one part of the model."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        """Of a step."""
        return self.forward + self.backward


@dataclass(frozen=True)
class StepFlops:
    """A step's, by part. `body` is the language model without its output layer, `logits` that layer."""

    vision: Flops
    connector: Flops
    body: Flops
    logits: Flops

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(part.both for part in (self.vision, self.connector, self.body, self.logits))


def step_flops(
    shape: LlavaShape,
    lengths: Sequence[int],
    images: int,
    loss_tokens: int,
    language: bool,
    vision: bool,
    causal: bool = True,
) -> StepFlops:
    """FLOPs of one step over samples of these lengths (expanded tokens) with so many images and supervised tokens.

    `language` and `vision` say what trains beside the connector: a frozen language model passes gradients on but has
    none of its own, a frozen tower is run forward only. Logits are computed at loss_tokens positions alone. `causal`
    attention does half the work; without it, what kernels do that compute all of it.
    """
    return StepFlops(
        vision=_vision(shape.vision, images, vision),
        connector=_connector(shape, images, vision),
        body=_body(shape.language, lengths, language, causal),
        logits=_through(2 * shape.language.embedding * loss_tokens, learns=language),
    )


def _through(forward: float, learns: bool, passes_on: bool = True) -> Flops:
    """A multiplication by weights: as much again for its own gradient, and for its input's."""
    return Flops(forward, forward * (learns + passes_on))


def _vision(shape: VisionShape, images: int, learns: bool) -> Flops:
    patches = _through(2 * shape.patch_matrix * shape.patches * images, learns, passes_on=False)
    blocks = _through(2 * shape.matrices * shape.tokens * images, learns, passes_on=learns)
    attention = 4 * shape.layers * shape.width * shape.tokens**2 * images
    backward = patches.backward + blocks.backward + 2 * attention * learns
    return Flops(patches.forward + blocks.forward + attention, backward)


def _connector(shape: LlavaShape, images: int, vision_learns: bool) -> Flops:
    tokens = shape.vision.patches * images
    first = _through(2 * shape.connector_in * tokens, learns=True, passes_on=vision_learns)
    second = _through(2 * shape.connector_out * tokens, learns=True)
    return Flops(first.forward + second.forward, first.backward + second.backward)


def _body(shape: LanguageShape, lengths: Sequence[int], learns: bool, causal: bool) -> Flops:
    matrices = _through(2 * shape.matrices * sum(lengths), learns)
    squares = sum(length * length for length in lengths)
    attention = (2 if causal else 4) * shape.layers * shape.attention_width * squares
    return Flops(matrices.forward + attention, matrices.backward + 2 * attention)
