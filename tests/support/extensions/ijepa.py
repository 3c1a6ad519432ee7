"""I-JEPA (Assran et al. 2023): a vision transformer without a class token, of which LLaVA reads the last layer."""

from raylava.models.families.family import Config, VisionFamily, vision_transformer_shape
from raylava.perf.shapes import VisionShape


def _shape(config: Config, pixels: int) -> VisionShape:
    return vision_transformer_shape(config, pixels, intermediate=config["intermediate_size"], has_cls=False)


FAMILY = VisionFamily(
    name="ijepa",
    model_types=("ijepa",),
    model_class="IJepaModel",
    defaults={
        "model_type": "ijepa",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    },
    shape=_shape,
    feature_layer=-1,
    only_own_image_size=True,
)
