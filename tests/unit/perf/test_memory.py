"""Predicted memory responds to world size, pack size, activation checkpointing and offload as it must."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from raylava.config.recipe import Language, Model, Vision
from raylava.models.shapes import model_shape
from raylava.perf.memory import (
    ExecutionConfig,
    PackShape,
    StepContext,
    TrainableModel,
    attention_mask,
    backward_temporaries,
    checkpoint_bytes,
    predict_memory,
    saved_activations,
)


def gemma(name: str) -> TrainableModel:
    vision = Vision(name="openai/clip-vit-large-patch14-336")
    shape = model_shape(Model(language=Language(name=name), vision=vision))
    return TrainableModel(shape, trains_language=True, trains_vision=False, bytes_per_value=2)


MODELS = st.sampled_from([gemma("google/gemma-2b-it"), gemma("google/gemma-7b-it")])
PACKS = st.builds(lambda tokens: PackShape(tokens, tokens // 5, tokens // 700 + 1), st.integers(512, 32_768))


@given(MODELS, PACKS, st.integers(1, 3), st.sampled_from([2, 8, 64]), st.booleans())
def test_more_workers_never_need_more_memory_each(
    model: TrainableModel, pack: PackShape, zero_stage: int, workers: int, activation_checkpointing: bool
) -> None:
    config = ExecutionConfig(zero_stage, False, False, activation_checkpointing, pack.tokens)
    assert predict_memory(model, config, pack, 2 * workers).peak <= predict_memory(model, config, pack, workers).peak


@given(MODELS, PACKS, st.integers(0, 3), st.sampled_from([1, 8, 64]))
def test_activation_checkpointing_never_needs_more_memory_and_longer_packs_never_less(
    model: TrainableModel, pack: PackShape, zero_stage: int, workers: int
) -> None:
    def peak(pack: PackShape, activation_checkpointing: bool) -> float:
        config = ExecutionConfig(zero_stage, False, False, activation_checkpointing, pack.tokens)
        return predict_memory(model, config, pack, workers).peak

    longer = PackShape(2 * pack.tokens, 2 * pack.loss_tokens, 2 * pack.images)
    assert peak(pack, activation_checkpointing=True) <= peak(pack, activation_checkpointing=False)
    assert peak(longer, activation_checkpointing=False) >= peak(pack, activation_checkpointing=False)


@given(MODELS, PACKS, st.integers(1, 3))
def test_offloaded_optimizer_is_on_the_host(model: TrainableModel, pack: PackShape, zero_stage: int) -> None:
    on_device, on_host = (
        predict_memory(model, ExecutionConfig(zero_stage, offload, False, False, pack.tokens), pack, 8)
        for offload in (False, True)
    )
    assert on_host.host == on_device.optimizer
    assert on_host.peak < on_device.peak


def test_checkpoint_holds_weights_master_weights_and_two_moments_of_what_trains() -> None:
    model = gemma("google/gemma-2b-it")
    assert checkpoint_bytes(model, ExecutionConfig(2, False, False, False, 4096)) == model.parameters * (2 + 4 + 4 + 4)


@given(MODELS, PACKS, st.booleans())
def test_dense_attention_saves_a_mask_in_every_layer_and_eager_the_probabilities_of_every_head(
    model: TrainableModel, pack: PackShape, recompute: bool
) -> None:
    config = ExecutionConfig(2, False, False, recompute, pack.tokens)

    def activations(name: str) -> float:
        step = StepContext(dataclasses.replace(model, attn_implementation=name), config, pack, 8)
        return saved_activations(step) + attention_mask(step) + backward_temporaries(step)

    varlen, language, pairs = activations("varlen"), model.shape.language, pack.tokens**2
    assert varlen == activations("flash_attention_2") == activations("flex_attention")
    layers = 1 if recompute else language.layers
    assert activations("sdpa") - varlen >= pairs + layers * pairs * model.bytes_per_value
    assert activations("eager") - varlen >= layers * language.heads * pairs * 4


def test_peak_memory_includes_the_mask_of_dense_attention() -> None:
    pack = PackShape(32_768, 100, 1)
    config = ExecutionConfig(3, True, True, True, pack.tokens)
    peaks = [
        predict_memory(dataclasses.replace(gemma("google/gemma-2b-it"), attn_implementation=name), config, pack, 8).peak
        for name in ("varlen", "sdpa")
    ]
    assert peaks[1] - peaks[0] >= 3 * pack.tokens**2, "booleans for all layers, values for the recomputed one"
