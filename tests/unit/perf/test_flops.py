"""FLOPs equal what torch's FlopCounterMode counts on transformers' modules."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GemmaForCausalLM

from raylava.perf.flops import step_flops
from tests.support.meta_models import CLIP_L, GEMMA_2B, VISION_TOWERS, connector_on_meta, llava_shape, on_meta


def torch_flops(run: Any, trains: bool, module: torch.nn.Module) -> tuple[int, int]:
    """Return the FLOPs that torch counts in forward and backward pass of `run`."""
    module.requires_grad_(trains)
    with FlopCounterMode(display=False) as forward:
        output = run()
    if not output.requires_grad:
        return forward.get_total_flops(), 0
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", ["CLIP-L/336", "DINOv2-L"])
def test_vision_tower_flops_match_torch(name: str, trains: bool) -> None:
    config, model_class, pixels = VISION_TOWERS[name]
    tower = on_meta(model_class, config)
    images = torch.empty(2, 3, pixels, pixels, device="meta")
    forward, backward = torch_flops(lambda: tower(images).last_hidden_state, trains, tower)
    predicted = step_flops(llava_shape(vision=name), [], 2, 0, language=False, vision=trains).vision
    assert predicted.forward == pytest.approx(forward, rel=1e-3)
    assert predicted.backward == pytest.approx(backward, rel=1e-3)


@pytest.mark.parametrize("vision_trains", [False, True])
def test_connector_flops_match_torch(vision_trains: bool) -> None:
    connector = connector_on_meta(CLIP_L)
    features = torch.empty(2, 576, 1024, device="meta", requires_grad=vision_trains)
    counted = torch_flops(lambda: connector(features), True, connector)
    predicted = step_flops(llava_shape(), [], 2, 0, language=False, vision=vision_trains).connector
    assert (predicted.forward, predicted.backward) == counted


@pytest.mark.parametrize("trains", [False, True])
def test_language_model_flops_match_torch(trains: bool) -> None:
    model = on_meta(GemmaForCausalLM, GEMMA_2B)
    embedded = torch.empty(1, 700, 2048, device="meta", requires_grad=True)
    loss_tokens = 50

    def run() -> torch.Tensor:
        return model(inputs_embeds=embedded, logits_to_keep=loss_tokens).logits

    forward, backward = torch_flops(run, trains, model)
    predicted = step_flops(llava_shape(), [700], 0, loss_tokens, language=trains, vision=False, causal=False)
    assert predicted.body.forward + predicted.logits.forward == pytest.approx(forward, rel=1e-3)
    assert predicted.body.backward + predicted.logits.backward == pytest.approx(backward, rel=1e-3)


def test_frozen_parts_need_fewer_flops() -> None:
    def flops(language: bool, vision: bool) -> float:
        return step_flops(llava_shape(), [700] * 10, 10, 1000, language, vision).total

    assert flops(False, False) < flops(True, False) < flops(True, True)


def test_one_long_sample_needs_more_attention_flops_than_short_samples_of_as_many_tokens() -> None:
    long = step_flops(llava_shape(), [4096], 0, 100, True, False).total
    short = step_flops(llava_shape(), [512] * 8, 0, 100, True, False).total
    assert long - short == 6 * 18 * 2048 * (4096**2 - 8 * 512**2)
