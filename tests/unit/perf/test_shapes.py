"""Parameter counts equal those of transformers' modules."""

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM

from raylava.models.families import gemma
from tests.support.meta_models import (
    CLIP_L,
    GEMMA_2B,
    LANGUAGE_MODELS,
    VISION_TOWERS,
    connector_on_meta,
    llava_shape,
    on_meta,
    vision_shape,
)


def parameter_count(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_model_parameter_count_is_exact(name: str) -> None:
    config = LANGUAGE_MODELS[name]
    assert gemma.FAMILY.shape(config.to_dict()).parameters == parameter_count(on_meta(GemmaForCausalLM, config))


@pytest.mark.parametrize("name", VISION_TOWERS)
def test_vision_tower_parameter_count_is_exact(name: str) -> None:
    config, model_class, _ = VISION_TOWERS[name]
    assert vision_shape(name).parameters == parameter_count(on_meta(model_class, config))


def test_untied_output_layer_counts_beside_the_embedding() -> None:
    config = GemmaConfig(**GEMMA_2B.to_dict() | {"tie_word_embeddings": False})
    assert gemma.FAMILY.shape(config.to_dict()).parameters == parameter_count(on_meta(GemmaForCausalLM, config))


def test_connector_parameter_count_is_exact() -> None:
    assert llava_shape().connector == parameter_count(connector_on_meta(CLIP_L))
