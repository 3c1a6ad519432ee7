"""CLIP's vision transformer: a class token, a norm before the blocks, images of one size (Radford et al. 2021)."""

from raylava.models.families.family import Config, PublishedVision, VisionFamily, patch_count
from raylava.perf.shapes import VisionShape


def _shape(config: Config, pixels: int) -> VisionShape:
    width, patch = config["hidden_size"], config["patch_size"]
    return VisionShape(
        width=width,
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        patch=patch,
        patches=patch_count(pixels, patch),
        positions=patch_count(config["image_size"], patch) + 1,
        has_cls=True,
        patch_bias=False,
        extra=width + 2 * width,  # class embedding; norm before the blocks
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
    published={
        "openai/clip-vit-large-patch14-336": _large(336),
        "openai/clip-vit-large-patch14": _large(224),
    },
)
