"""DINOv2: a class token, layer scales, position embeddings interpolated to any image size (Oquab et al. 2023)."""

from raylava.models.families.family import Config, PublishedVision, VisionFamily, vision_transformer_shape
from raylava.perf.shapes import VisionShape


def _shape(config: Config, pixels: int) -> VisionShape:
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    return vision_transformer_shape(
        config,
        pixels,
        intermediate=width * config["mlp_ratio"],
        has_cls=True,
        extra=2 * width + 2 * layers * width,  # class and mask token; two layer scales per block
    )


def _published(width: int, layers: int) -> PublishedVision:
    config = {
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "mlp_ratio": 4,
        "image_size": 518,
        "patch_size": 14,
    }
    return PublishedVision(config, image_size=224)


FAMILY = VisionFamily(
    name="dinov2",
    model_types=("dinov2",),
    model_class="Dinov2Model",
    defaults={
        "model_type": "dinov2",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "mlp_ratio": 4,
        "image_size": 224,
        "patch_size": 14,
    },
    shape=_shape,
    other_parts=("classifier.",),
    published={
        "facebook/dinov2-large": _published(1024, 24),
        "facebook/dinov2-base": _published(768, 12),
    },
)
