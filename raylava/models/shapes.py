"""Dimensions of a recipe's model without its weights; those of published backbones come from their family modules."""

from dataclasses import dataclass
from typing import Any

from raylava.config.recipe import Language, Model, Vision
from raylava.models.families import language_families, vision_families
from raylava.models.families.family import LanguageFamily, VisionFamily
from raylava.models.registry import (
    load_tokenizer,
    padded_vocabulary,
    read_language,
    read_pixels,
    read_vision,
)
from raylava.perf.shapes import LlavaShape


@dataclass(frozen=True)
class BackboneConfigs:
    """The families and complete configs of both backbones, and the side of the input images in pixels.

    The vocabulary size in the language model's config includes `<image>`.
    """

    language_family: LanguageFamily
    language: dict[str, Any]
    vision_family: VisionFamily
    vision: dict[str, Any]
    pixels: int

    @property
    def shape(self) -> LlavaShape:
        """Return the dimensions of the model."""
        return LlavaShape(self.language_family.shape(self.language), self.vision_family.shape(self.vision, self.pixels))


def model_shape(model: Model) -> LlavaShape:
    """Return the dimensions of a recipe's model. Raises UserError as `backbone_configs` does."""
    return backbone_configs(model).shape


def backbone_configs(model: Model) -> BackboneConfigs:
    """Return the configs of a recipe's backbones.

    Raises UserError if a backbone is not published in its family module and its config.json cannot be read.
    """
    language_family, language = _language(model.language)
    vision_family, vision, pixels = _vision(model.vision)
    return BackboneConfigs(language_family, language, vision_family, vision, pixels)


def _language(language: Language) -> tuple[LanguageFamily, dict[str, Any]]:
    for family in language_families().values():
        if config := family.published.get(language.name):
            rows = config["vocab_size"]
            return family, family.complete(config) | {"vocab_size": padded_vocabulary(rows + 1, rows)}
    family, config = read_language(language)
    rows = padded_vocabulary(len(load_tokenizer(language)), config["vocab_size"])
    return family, config | {"vocab_size": rows}


def _vision(vision: Vision) -> tuple[VisionFamily, dict[str, Any], int]:
    for family in vision_families().values():
        if published := family.published.get(vision.name):
            return family, family.complete(published.config), vision.image_size or published.image_size
    family, config = read_vision(vision)
    return family, config, read_pixels(vision, family, config).size
