"""Dimensions of published backbones, copied from their config.json, so that estimates need neither the hub nor weights.

`registry.py` lists the backbones that raylava trains.
"""

from typing import Any

from raylava.config.recipe import Language, Model, Vision
from raylava.models.registry import (
    KNOWN_VISION,
    load_tokenizer,
    padded_vocabulary,
    read_config,
    resolve_vision,
)
from raylava.perf.shapes import LanguageShape, LlavaShape, VisionShape, language_shape, vision_shape


def _gemma(width: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "model_type": "gemma",
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "vocab_size": 256_000,
    }


def _clip_large(pixels: int) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": pixels,
        "patch_size": 14,
    }


def _dinov2(width: int, layers: int) -> dict[str, Any]:
    shared = {"model_type": "dinov2", "mlp_ratio": 4, "image_size": 518, "patch_size": 14}
    return shared | {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}


_GEMMA_2B, _GEMMA_7B = _gemma(2048, 16_384, 18, 8, 1), _gemma(3072, 24_576, 28, 16, 16)
LANGUAGE = {
    "google/gemma-2b-it": _GEMMA_2B,
    "google/gemma-1.1-2b-it": _GEMMA_2B,
    "google/gemma-7b-it": _GEMMA_7B,
    "google/gemma-1.1-7b-it": _GEMMA_7B,
}
VISION = {
    "openai/clip-vit-large-patch14-336": _clip_large(336),
    "openai/clip-vit-large-patch14": _clip_large(224),
    "facebook/dinov2-large": _dinov2(1024, 24),
    "facebook/dinov2-base": _dinov2(768, 12),
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}


def model_shape(model: Model) -> LlavaShape:
    """Return the shape of a recipe's model, with `<image>` added to the vocabulary.

    Raises UserError if a backbone is not listed in this module and its config.json cannot be read.
    """
    return LlavaShape(_language(model.language), _vision(model.vision))


def model_configs(model: Model) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return the configs of the language model and the vision tower, and the number of patches per image.

    The vocabulary size in the language model's config includes `<image>`.
    """
    config, _ = _vision_config(model.vision)
    return _language_config(model.language), config.get("vision_config", config), _vision(model.vision).patches


def _language(language: Language) -> LanguageShape:
    return language_shape(_language_config(language))


def _language_config(language: Language) -> dict[str, Any]:
    published = LANGUAGE.get(language.name)
    config = published or read_config(language.name, language.revision, "language")
    rows = config["vocab_size"]
    tokens = rows + 1 if published else len(load_tokenizer(language))
    return {**config, "vocab_size": padded_vocabulary(tokens, rows)}


def _vision(vision: Vision) -> VisionShape:
    return vision_shape(*_vision_config(vision))


def _vision_config(vision: Vision) -> tuple[dict[str, Any], int]:
    """Return the config of a vision tower and the side of its input images in pixels."""
    published = VISION.get(vision.name)
    if published is None:
        return read_config(vision.name, vision.revision, "vision"), resolve_vision(vision).pixels.size
    return published, vision.image_size or KNOWN_VISION[vision.name].image_size
