"""The private parts of transformers that raylava uses exist and do what the feature that uses them needs."""

import pytest
from transformers import GemmaConfig, GemmaForCausalLM

from raylava.compat.transformers import attn_implementation


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_implementation_that_is_read_is_the_one_that_was_set(name: str) -> None:
    """Symbol: PretrainedConfig._attn_implementation."""
    config = GemmaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8, vocab_size=8
    )
    model = GemmaForCausalLM(config)
    model.set_attn_implementation(name)
    assert attn_implementation(model) == name
    assert attn_implementation(model.model.layers[0].self_attn) == name
