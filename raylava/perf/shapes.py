"""A LLaVA's dimensions, from its parts' configuration files, and how many parameters they make: exactly."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raylava.errors import UserError


@dataclass(frozen=True)
class LanguageShape:
    """A Gemma: gated MLP, grouped-query attention, no biases, the output layer tied to the embedding."""

    width: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int

    @property
    def attention_width(self) -> int:
        """All heads' queries."""
        return self.heads * self.head_size

    @property
    def matrices(self) -> int:
        """Weights that multiply each token, of all layers."""
        attention = 2 * self.width * self.attention_width + 2 * self.width * self.kv_heads * self.head_size
        return self.layers * (attention + 3 * self.width * self.intermediate)

    @property
    def tensors(self) -> list[tuple[int, int]]:
        """(size, how many of it) of all weights."""
        queries, shared = self.width * self.attention_width, self.width * self.kv_heads * self.head_size
        layer = [(queries, 2), (shared, 2), (self.width * self.intermediate, 3), (self.width, 2)]
        return [(self.embedding, 1), (self.width, 1), *((size, count * self.layers) for size, count in layer)]

    @property
    def embedding(self) -> int:
        """The embedding, which is the output layer too."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """All of them: the tied embedding once."""
        norms = (2 * self.layers + 1) * self.width
        return self.embedding + self.matrices + norms


@dataclass(frozen=True)
class VisionShape:
    """A ViT. `positions` are those it has embeddings for, `patches` those of the images it is shown; `extra` counts
    what its family has besides patches, blocks and the last norm; `has_cls` adds a token to the patches.
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
        """The sequence that its blocks see."""
        return self.patches + self.has_cls

    @property
    def patch_matrix(self) -> int:
        """The weights that make a patch's 3 × patch × patch values an embedding."""
        return 3 * self.patch**2 * self.width

    @property
    def matrices(self) -> int:
        """Weights that multiply each token, of all blocks."""
        return self.layers * (4 * self.width**2 + 2 * self.width * self.intermediate)

    @property
    def tensors(self) -> list[tuple[int, int]]:
        """(size, how many of it) of all weights; what its family has besides counts as one."""
        wide, inner = self.width**2, self.width * self.intermediate
        layer = [(wide, 4), (inner, 2), (self.width, 9), (self.intermediate, 1)]
        rest = [(self.patch_matrix, 1), (self.positions * self.width, 1), (self.extra, 1), (self.width, 2)]
        rest += [(self.width, 1)] * self.patch_bias
        return [*rest, *((size, count * self.layers) for size, count in layer)]

    @property
    def parameters(self) -> int:
        """All of them, those that LLaVA does not use included."""
        biases = self.layers * (5 * self.width + self.intermediate)
        norms = (2 * self.layers + 1) * 2 * self.width
        patches = self.patch_matrix + self.patch_bias * self.width
        return patches + self.positions * self.width + self.matrices + biases + norms + self.extra


@dataclass(frozen=True)
class LlavaShape:
    """A language model, a vision tower, and the connector between them: two linear layers with biases."""

    language: LanguageShape
    vision: VisionShape

    @property
    def connector_in(self) -> int:
        """Weights of the first layer."""
        return self.vision.width * self.language.width

    @property
    def connector_out(self) -> int:
        """Weights of the second."""
        return self.language.width**2

    @property
    def connector(self) -> int:
        """The connector's parameters."""
        return self.connector_in + self.connector_out + 2 * self.language.width

    @property
    def tensors(self) -> list[tuple[int, int]]:
        """(size, how many of it) of all weights."""
        connector = [(self.connector_in, 1), (self.connector_out, 1), (self.language.width, 2)]
        return [*self.language.tensors, *self.vision.tensors, *connector]

    def trained(self, language: bool, vision: bool) -> int:
        """Parameters that train: the connector, and those parts."""
        return self.connector + language * self.language.parameters + vision * self.vision.parameters

    @property
    def parameters(self) -> int:
        """All of the model's."""
        return self.language.parameters + self.vision.parameters + self.connector


def shape_of(config: Any) -> LlavaShape:
    """The shape in a LlavaConfig."""
    vision = config.vision_config.to_dict()
    pixels = math.isqrt(config.image_seq_length) * vision["patch_size"]
    return LlavaShape(language_shape(config.text_config.to_dict()), vision_shape(vision, pixels))


def language_shape(config: Mapping[str, Any]) -> LanguageShape:
    """The shape in a Gemma's config.json."""
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
    """The shape in a tower's config.json (or the vision part of it), shown images of so many pixels a side.

    Raises UserError for a family that is not known.
    """
    tower = config.get("vision_config", config)
    family = _FAMILIES.get(str(tower["model_type"]).removesuffix("_vision_model"))
    if family is None:
        raise UserError(f"a vision tower of type {tower['model_type']}: known here: {', '.join(_FAMILIES)}")
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
        extra=width + 2 * width,  # the class embedding; the norm before the blocks
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
        extra=2 * width + 2 * layers * width,  # class and mask tokens; each block's two layer scales
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
