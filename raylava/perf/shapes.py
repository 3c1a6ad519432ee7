"""Dimensions of a LLaVA model, read from the configurations of its parts, and its exact parameter counts."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raylava.errors import UserError


@dataclass(frozen=True)
class LanguageShape:
    """A Gemma language model: gated MLP, grouped-query attention, no biases, output layer tied to the embedding."""

    width: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int

    @property
    def attention_width(self) -> int:
        """Width of the queries of all heads together."""
        return self.heads * self.head_size

    @property
    def matrices(self) -> int:
        """Number of weights in all layers' matrices, which multiply every token."""
        attention = 2 * self.width * self.attention_width + 2 * self.width * self.kv_heads * self.head_size
        return self.layers * (attention + 3 * self.width * self.intermediate)

    @property
    def tensors(self) -> list[tuple[int, int]]:
        """(size, count) pairs that cover all weight tensors."""
        queries, shared = self.width * self.attention_width, self.width * self.kv_heads * self.head_size
        layer = [(queries, 2), (shared, 2), (self.width * self.intermediate, 3), (self.width, 2)]
        return [(self.embedding, 1), (self.width, 1), *((size, count * self.layers) for size, count in layer)]

    @property
    def embedding(self) -> int:
        """Number of weights of the embedding, which is also the output layer."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """Number of parameters; the tied embedding counts once."""
        norms = (2 * self.layers + 1) * self.width
        return self.embedding + self.matrices + norms


@dataclass(frozen=True)
class VisionShape:
    """A vision transformer.

    `positions` is the number of position embeddings, `patches` the number of patches of an input image, `patch` a
    patch's side in pixels. `has_cls` adds a class token to the patches. `extra` counts the parameters that the family
    has besides patch and position embeddings, blocks and the last norm.
    """

    width: int
    intermediate: int
    layers: int
    patch: int
    patches: int
    positions: int
    has_cls: bool
    patch_bias: bool
    extra: int

    @property
    def tokens(self) -> int:
        """Sequence length in the blocks."""
        return self.patches + self.has_cls

    @property
    def patch_matrix(self) -> int:
        """Number of weights that embed the 3 × patch × patch values of a patch."""
        return 3 * self.patch**2 * self.width

    @property
    def matrices(self) -> int:
        """Number of weights in all blocks' matrices, which multiply every token."""
        return self.layers * (4 * self.width**2 + 2 * self.width * self.intermediate)

    @property
    def tensors(self) -> list[tuple[int, int]]:
        """(size, count) pairs that cover all weight tensors; `extra` counts as one tensor."""
        attention, mlp = self.width**2, self.width * self.intermediate
        layer = [(attention, 4), (mlp, 2), (self.width, 9), (self.intermediate, 1)]
        outside = [(self.patch_matrix, 1), (self.positions * self.width, 1), (self.extra, 1), (self.width, 2)]
        if self.patch_bias:
            outside.append((self.width, 1))
        return [*outside, *((size, count * self.layers) for size, count in layer)]

    @property
    def parameters(self) -> int:
        """Number of parameters, including those that LLaVA does not use."""
        biases = self.layers * (5 * self.width + self.intermediate)
        norms = (2 * self.layers + 1) * 2 * self.width
        patches = self.patch_matrix + self.patch_bias * self.width
        return patches + self.positions * self.width + self.matrices + biases + norms + self.extra


@dataclass(frozen=True)
class LlavaShape:
    """A language model, a vision tower and the connector between them: two linear layers with biases."""

    language: LanguageShape
    vision: VisionShape

    @property
    def connector_in(self) -> int:
        """Number of weights of the connector's first layer, without biases."""
        return self.vision.width * self.language.width

    @property
    def connector_out(self) -> int:
        """Number of weights of the connector's second layer, without biases."""
        return self.language.width**2

    @property
    def connector(self) -> int:
        """Number of parameters of the connector."""
        return self.connector_in + self.connector_out + 2 * self.language.width

    @property
    def tensors(self) -> list[tuple[int, int]]:
        """(size, count) pairs that cover all weight tensors."""
        connector = [(self.connector_in, 1), (self.connector_out, 1), (self.language.width, 2)]
        return [*self.language.tensors, *self.vision.tensors, *connector]

    def trained(self, language: bool, vision: bool) -> int:
        """Return the number of parameters that train: the connector, and each part whose argument is true."""
        language_parameters = self.language.parameters if language else 0
        vision_parameters = self.vision.parameters if vision else 0
        return self.connector + language_parameters + vision_parameters

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return self.language.parameters + self.vision.parameters + self.connector


def shape_from_config(config: Any) -> LlavaShape:
    """Return the shape that a transformers LlavaConfig describes."""
    vision = config.vision_config.to_dict()
    pixels = math.isqrt(config.image_seq_length) * vision["patch_size"]
    return LlavaShape(language_shape(config.text_config.to_dict()), vision_shape(vision, pixels))


def language_shape(config: Mapping[str, Any]) -> LanguageShape:
    """Return the shape that the config.json of a Gemma model describes."""
    return LanguageShape(
        width=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_size=config["head_dim"],
        vocabulary=config["vocab_size"],
    )


def vision_shape(config: Mapping[str, Any], pixels: int) -> VisionShape:
    """Return the shape that the config.json of a vision tower, or its vision part, describes for square images.

    `pixels` is the images' side. Raises UserError for an unsupported family.
    """
    tower = config.get("vision_config", config)
    family = _FAMILIES.get(str(tower["model_type"]).removesuffix("_vision_model"))
    if family is None:
        raise UserError(f"unsupported vision tower type {tower['model_type']}; choose one of: {', '.join(_FAMILIES)}")
    return family(tower, pixels)


def _grid(side: int, patch: int) -> int:
    return (side // patch) ** 2


def _clip(config: Mapping[str, Any], pixels: int) -> VisionShape:
    width, patch = config["hidden_size"], config["patch_size"]
    return VisionShape(
        width=width,
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        patch=patch,
        patches=_grid(pixels, patch),
        positions=_grid(config["image_size"], patch) + 1,
        has_cls=True,
        patch_bias=False,
        extra=width + 2 * width,  # class embedding; norm before the blocks
    )


def _dinov2(config: Mapping[str, Any], pixels: int) -> VisionShape:
    width, patch, layers = config["hidden_size"], config["patch_size"], config["num_hidden_layers"]
    return VisionShape(
        width=width,
        intermediate=width * config["mlp_ratio"],
        layers=layers,
        patch=patch,
        patches=_grid(pixels, patch),
        positions=_grid(config["image_size"], patch) + 1,
        has_cls=True,
        patch_bias=True,
        extra=2 * width + 2 * layers * width,  # class and mask token; two layer scales per block
    )


def _siglip(config: Mapping[str, Any], pixels: int) -> VisionShape:
    width, patch, intermediate = config["hidden_size"], config["patch_size"], config["intermediate_size"]
    pooling = width + 4 * width**2 + 4 * width + 2 * width + 2 * width * intermediate + width + intermediate
    return VisionShape(
        width=width,
        intermediate=intermediate,
        layers=config["num_hidden_layers"],
        patch=patch,
        patches=_grid(pixels, patch),
        positions=_grid(config["image_size"], patch),
        has_cls=False,
        patch_bias=True,
        extra=pooling,  # attention pooling, whose output LLaVA does not read
    )


_FAMILIES: dict[str, Callable[[Mapping[str, Any], int], VisionShape]] = {
    "clip": _clip,
    "dinov2": _dinov2,
    "siglip": _siglip,
}
