"""CLIP's vision transformer: a class token, a norm before the blocks, images of one size (Radford et al. 2021)."""

from raylava.models.families.family import Config, PublishedVision, VisionFamily, vision_transformer_shape
from raylava.perf.shapes import VisionShape


def _shape(config: Config, pixels: int) -> VisionShape:
    return vision_transformer_shape(
        config,
        pixels,
        intermediate=config["intermediate_size"],
        has_cls=True,
        patch_bias=False,
        extra=3 * config["hidden_size"],  # class embedding; weight and bias of the norm before the blocks
    )


def _large(pixels: int) -> PublishedVision:
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": pixels,
        "patch_size": 14,
    }
    return PublishedVision(config, pixels)


FAMILY = VisionFamily(
    name="clip",
    model_types=("clip", "clip_vision_model"),
    model_class="CLIPVisionModel",
    defaults={
        "model_type": "clip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
    },
    shape=_shape,
    only_own_image_size=True,
    hub_prefix="vision_model.",
    other_parts=("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
    published={
        "openai/clip-vit-large-patch14-336": _large(336),
        "openai/clip-vit-large-patch14": _large(224),
    },
)
