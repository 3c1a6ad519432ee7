"""The dimensions of published backbones, as their config.json says, so that an estimate needs neither hub nor weights.

tests/cost holds them against transformers' own modules. Which backbones raylava trains is model/backbones.py's.
"""

from typing import Any

from raylava.config.recipe import Language, Model, Vision
from raylava.models.registry import (
    KNOWN_VISION,
    load_tokenizer,
    read_config,
    resolve_vision,
    vocabulary_for,
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


def shape_of_model(model: Model) -> LlavaShape:
    """The shape that a recipe's two backbones make together, `<image>` in the vocabulary.

    Raises UserError for a backbone that is not published here and whose config.json cannot be read.
    """
    return LlavaShape(_language(model.language), _vision(model.vision))


def configs_of_model(model: Model) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Both backbones' config.json, the language model's with room for `<image>`, and a image's patches."""
    config, _ = _vision_config(model.vision)
    return _language_config(model.language), config.get("vision_config", config), _vision(model.vision).patches


def _language(language: Language) -> LanguageShape:
    return language_shape(_language_config(language))


def _language_config(language: Language) -> dict[str, Any]:
    known = LANGUAGE.get(language.name)
    config = known or read_config(language.name, language.revision, "language")
    rows = config["vocab_size"]
    tokens = rows + 1 if known else len(load_tokenizer(language))
    return {**config, "vocab_size": vocabulary_for(tokens, rows)}


def _vision(vision: Vision) -> VisionShape:
    return vision_shape(*_vision_config(vision))


def _vision_config(vision: Vision) -> tuple[dict[str, Any], int]:
    """The tower's configuration, and the pixels a side that it is shown."""
    known = VISION.get(vision.name)
    if known is None:
        return read_config(vision.name, vision.revision, "vision"), resolve_vision(vision).pixels.size
    return known, vision.image_size or KNOWN_VISION[vision.name].image_size
