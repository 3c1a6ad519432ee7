"""Model FLOPs of training a LLaVA, and the peak of devices by name: what model FLOPs utilisation (MFU) is made of.

Counted is what the model needs, not what an implementation spends: recomputed activations and padding count nothing
(PaLM, Chowdhery et al. 2022, appendix B). Pure functions.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

# Dense bf16 tensor-core peaks in FLOP/s, from the makers' data sheets; the first name found in the device's counts.
_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class ModelSize:
    """What FLOPs follow from: weights that multiply (embeddings look up and count nothing), layers and widths."""

    body: int  # the language model's weights without embedding and output layer
    head: int  # the output layer's
    layers: int
    attention_width: int  # heads × head size
    vision: int  # the tower's weights
    vision_layers: int
    vision_width: int
    patches: int
    connector: int


def model_size(llava: "LlavaForConditionalGeneration") -> ModelSize:
    """The sizes of an assembled model, read before ZeRO stage 3 cuts its weights up."""
    text, vision = llava.config.text_config, llava.config.vision_config
    count = {
        part: sum(weight.numel() for weight in module.parameters())
        for part, module in (
            ("language", llava.model.language_model),
            ("vision", llava.model.vision_tower),
            ("connector", llava.model.multi_modal_projector),
        )
    }
    embedding = text.vocab_size * text.hidden_size
    return ModelSize(
        body=count["language"] - embedding,
        head=embedding,
        layers=text.num_hidden_layers,
        attention_width=text.num_attention_heads * text.head_dim,
        vision=count["vision"],
        vision_layers=vision.num_hidden_layers,
        vision_width=vision.hidden_size,
        patches=llava.config.image_seq_length,
        connector=count["connector"],
    )


def step_flops(
    size: ModelSize, lengths: list[int], images: int, supervised: int, language: bool, vision: bool
) -> float:
    """FLOPs of one step over samples of these lengths (expanded tokens) with so many images and supervised tokens.

    A multiplication by a weight costs 2 FLOPs a token forward, 2 for the gradient of its input and 2 for its own.
    `language` and `vision` say what trains: a frozen language model passes gradients on but has none of its own, a
    frozen tower is run forward only. Logits are computed at supervised positions alone; attention is causal (half).
    """
    tokens = sum(lengths)
    through = 6 if language else 4
    attention = 3 * 2 * size.layers * size.attention_width * sum(length * length for length in lengths)
    tower = 2 * size.vision * size.patches + 4 * size.vision_layers * size.vision_width * size.patches**2
    return (
        through * (size.body * tokens + size.head * supervised)
        + attention
        + 6 * size.connector * size.patches * images
        + (3 if vision else 1) * tower * images
    )


def peak_flops(device_name: str) -> float | None:
    """The device's dense bf16 peak in FLOP/s, None for one that is not listed (a CPU)."""
    return next((peak for name, peak in _PEAKS.items() if name in device_name), None)
