"""Published backbones as transformers modules on torch's meta device, which allocate no memory."""

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    GemmaConfig,
    LlavaConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from raylava.models.families import clip, dinov2, gemma, siglip
from raylava.perf.shapes import LlavaShape, VisionShape

CLIP_L = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
DINO_L = Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14)
SIGLIP = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
GEMMA_2B = GemmaConfig(
    hidden_size=2048,
    intermediate_size=16384,
    num_hidden_layers=18,
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=256,
    vocab_size=256_000,
)
GEMMA_7B = GemmaConfig(
    hidden_size=3072,
    intermediate_size=24576,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=256,
    vocab_size=256_000,
)
LANGUAGE_MODELS = {"Gemma-2B": GEMMA_2B, "Gemma-7B": GEMMA_7B}
# Config, module class and side of the input images in pixels, by name.
VISION_TOWERS: dict[str, tuple[Any, type[PreTrainedModel], int]] = {
    "CLIP-L/336": (CLIP_L, CLIPVisionModel, 336),
    "DINOv2-L": (DINO_L, Dinov2Model, 224),
    "SigLIP-so400m": (SIGLIP, SiglipVisionModel, 384),
}


def on_meta(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """Build the module without memory, with eager attention, whose matrix products torch counts."""
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return model_class(config)


def connector_on_meta(vision_config: Any) -> torch.nn.Module:
    """Build the connector between this vision tower and Gemma-2B without memory."""
    with torch.device("meta"):
        return LlavaMultiModalProjector(LlavaConfig(vision_config=vision_config, text_config=GEMMA_2B))


def llava_shape(language: Any = GEMMA_2B, vision: str = "CLIP-L/336") -> LlavaShape:
    """Return the shape of a LLaVA of this language model and this vision tower."""
    return LlavaShape(gemma.FAMILY.shape(language.to_dict()), vision_shape(vision))


def vision_shape(name: str) -> VisionShape:
    """Return the shape of one of VISION_TOWERS."""
    config, _, pixels = VISION_TOWERS[name]
    (family,) = (module.FAMILY for module in (clip, dinov2, siglip) if config.model_type in module.FAMILY.model_types)
    return family.shape(config.to_dict(), pixels)
