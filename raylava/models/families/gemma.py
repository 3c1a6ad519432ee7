"""Gemma 1: gated MLP, grouped-query attention, an output layer tied to the embedding (Gemma Team 2024)."""

from typing import Any

from raylava.models.families.family import Config, LanguageFamily
from raylava.models.templates import Template
from raylava.perf.shapes import LanguageShape

TEMPLATE = Template(
    begin="<bos>",
    open="<start_of_turn>",
    close="<end_of_turn>",
    user_header="user\n",
    model_header="model\n",
    gap="\n",
)


def decoder_shape(config: Config) -> LanguageShape:
    """Return the dimensions of a decoder with Gemma's layers; other families of such layers may use it too."""
    return LanguageShape(
        width=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_size=config["head_dim"],
        vocabulary=config["vocab_size"],
        is_tied=config["tie_word_embeddings"],
    )


def embedding_scale(config: Config) -> float:
    """Return √width, by which Gemma multiplies its token embeddings."""
    return float(config["hidden_size"]) ** 0.5


_DEFAULTS: dict[str, Any] = {
    "model_type": "gemma",
    "hidden_size": 3072,
    "intermediate_size": 24_576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "vocab_size": 256_000,
    "tie_word_embeddings": True,
}
_7B = _DEFAULTS
_2B = _DEFAULTS | {
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
}
FAMILY = LanguageFamily(
    name="gemma",
    model_types=("gemma",),
    template=TEMPLATE,
    defaults=_DEFAULTS,
    shape=decoder_shape,
    embedding_scale=embedding_scale,
    published={
        "google/gemma-2b-it": _2B,
        "google/gemma-1.1-2b-it": _2B,
        "google/gemma-7b-it": _7B,
        "google/gemma-1.1-7b-it": _7B,
    },
)
