"""Llama-like decoders whose conversations have ChatML's control tokens and whose output layer is not tied."""

from raylava.models.families.family import Config, LanguageFamily
from raylava.models.families.gemma import decoder_shape
from raylava.models.templates import Template
from raylava.perf.shapes import LanguageShape


def _shape(config: Config) -> LanguageShape:
    head_size = config["hidden_size"] // config["num_attention_heads"]
    return decoder_shape({**config, "head_dim": head_size})


FAMILY = LanguageFamily(
    name="llama",
    model_types=("llama",),
    template=Template(
        begin="<bos>",
        open="<|im_start|>",
        close="<|im_end|>",
        user_header="user\n",
        model_header="assistant\n",
        gap="\n",
    ),
    defaults={
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32_000,
        "tie_word_embeddings": False,
    },
    shape=_shape,
)
