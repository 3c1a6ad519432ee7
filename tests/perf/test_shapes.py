"""Parameters are counted exactly and FLOPs as torch counts them, on transformers' own modules (without memory)."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    GemmaConfig,
    GemmaForCausalLM,
    LlavaConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from raylava.perf.flops import step_flops
from raylava.perf.hardware import peak_flops
from raylava.perf.shapes import LlavaShape, language_shape, vision_shape

CLIP_L = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
DINO_L = Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14)
SIGLIP = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
TOWERS: dict[str, tuple[Any, type[PreTrainedModel], int]] = {
    "CLIP-L/336": (CLIP_L, CLIPVisionModel, 336),
    "DINOv2-L": (DINO_L, Dinov2Model, 224),
    "SigLIP-so400m": (SIGLIP, SiglipVisionModel, 384),
}
GEMMA_2B = GemmaConfig(
    hidden_size=2048,
    intermediate_size=16384,
    num_hidden_layers=18,
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=256,
    vocab_size=256_000,
)
GEMMA_7B = GemmaConfig(
    hidden_size=3072,
    intermediate_size=24576,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=256,
    vocab_size=256_000,
)
MODELS = {"Gemma-2B": GEMMA_2B, "Gemma-7B": GEMMA_7B}


def on_meta(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """The real module without memory; plain attention, all of whose products are counted."""
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return kind(config)


def shape(language: Any = GEMMA_2B, tower: str = "CLIP-L/336") -> LlavaShape:
    config, _, pixels = TOWERS[tower]
    return LlavaShape(language_shape(language.to_dict()), vision_shape(config.to_dict(), pixels))


def count(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_a_language_models_parameters_are_counted_exactly(name: str) -> None:
    assert language_shape(MODELS[name].to_dict()).parameters == count(on_meta(GemmaForCausalLM, MODELS[name]))


@pytest.mark.parametrize("name", TOWERS)
def test_a_towers_parameters_are_counted_exactly(name: str) -> None:
    config, kind, pixels = TOWERS[name]
    assert vision_shape(config.to_dict(), pixels).parameters == count(on_meta(kind, config))


def connector(config: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return LlavaMultiModalProjector(LlavaConfig(vision_config=config, text_config=GEMMA_2B))


def test_a_connectors_parameters_are_counted_exactly() -> None:
    assert shape().connector == count(connector(CLIP_L))


def counted(run: Any, learns: bool, module: torch.nn.Module) -> tuple[int, int]:
    """FLOPs forward and backward, as torch counts them."""
    module.requires_grad_(learns)
    with FlopCounterMode(display=False) as forward:
        output = run()
    if not output.requires_grad:
        return forward.get_total_flops(), 0
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("name", ["CLIP-L/336", "DINOv2-L"])
def test_a_towers_flops_are_what_torch_counts(name: str, learns: bool) -> None:
    config, kind, pixels = TOWERS[name]
    tower = on_meta(kind, config)
    images = torch.empty(2, 3, pixels, pixels, device="meta")
    forward, backward = counted(lambda: tower(images).last_hidden_state, learns, tower)
    ours = step_flops(shape(tower=name), [], 2, 0, language=False, vision=learns).vision
    assert ours.forward == pytest.approx(forward, rel=1e-3)
    assert ours.backward == pytest.approx(backward, rel=1e-3)


@pytest.mark.parametrize("vision", [False, True])
def test_the_connectors_flops_are_what_torch_counts(vision: bool) -> None:
    projector = connector(CLIP_L)
    features = torch.empty(2, 576, 1024, device="meta", requires_grad=vision)
    found = counted(lambda: projector(features), True, projector)
    ours = step_flops(shape(), [], 2, 0, language=False, vision=vision).connector
    assert (ours.forward, ours.backward) == found


@pytest.mark.parametrize("learns", [False, True])
def test_a_language_models_flops_are_what_torch_counts(learns: bool) -> None:
    model = on_meta(GemmaForCausalLM, GEMMA_2B)
    embedded = torch.empty(1, 700, 2048, device="meta", requires_grad=True)
    kept = 50

    def run() -> torch.Tensor:
        return model(inputs_embeds=embedded, logits_to_keep=kept).logits

    forward, backward = counted(run, learns, model)
    ours = step_flops(shape(), [700], 0, kept, language=learns, vision=False, causal=False)
    assert ours.body.forward + ours.logits.forward == pytest.approx(forward, rel=1e-3)
    assert ours.body.backward + ours.logits.backward == pytest.approx(backward, rel=1e-3)


def test_what_does_not_train_costs_less() -> None:
    def flops(language: bool, vision: bool) -> float:
        return step_flops(shape(), [700] * 10, 10, 1000, language, vision).total

    assert flops(False, False) < flops(True, False) < flops(True, True)


def test_long_samples_cost_more_attention_than_as_many_tokens_in_short_ones() -> None:
    long = step_flops(shape(), [4096], 0, 100, True, False).total
    short = step_flops(shape(), [512] * 8, 0, 100, True, False).total
    assert long - short == 6 * 18 * 2048 * (4096**2 - 8 * 512**2)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("Tesla T4", 65e12), ("cpu", None)]
)
def test_peaks_are_known_by_the_devices_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
