"""SigLIP: no class token, an attention pooling head that LLaVA does not read (Zhai et al. 2023)."""

from raylava.models.families.family import Config, PublishedVision, VisionFamily, vision_transformer_shape
from raylava.perf.shapes import VisionShape


def _shape(config: Config, pixels: int) -> VisionShape:
    width, intermediate = config["hidden_size"], config["intermediate_size"]
    pooling = width + 4 * width**2 + 4 * width + 2 * width + 2 * width * intermediate + width + intermediate
    return vision_transformer_shape(config, pixels, intermediate=intermediate, has_cls=False, extra=pooling)


_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
FAMILY = VisionFamily(
    name="siglip",
    model_types=("siglip", "siglip_vision_model"),
    model_class="SiglipVisionModel",
    defaults={
        "model_type": "siglip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    },
    shape=_shape,
    only_own_image_size=True,
    hub_prefix="vision_model.",
    other_parts=("text_model.", "logit_scale", "logit_bias"),
    published={"google/siglip-so400m-patch14-384": PublishedVision(_SO400M, 384)},
)
