"""The workload of a step counts what its attention executes: all pairs of a pack if dense, else of each sample."""

import dataclasses

import numpy as np

from raylava.config.recipe import Language, Model, Training, Vision
from raylava.corpus.blocks import Lengths
from raylava.models.shapes import model_shape
from raylava.perf.memory import TrainableModel
from raylava.train.batch_plan import BatchPlan
from raylava.train.sampled_steps import SampledSteps, sample_steps

LENGTHS = Lengths(*(np.full(64, value, np.int32) for value in (512, 100, 1)))


def sampled_steps(attention: str) -> SampledSteps:
    vision = Vision(name="openai/clip-vit-large-patch14-336")
    shape = model_shape(Model(language=Language(name="google/gemma-2b-it"), vision=vision))
    model = TrainableModel.of(shape, "finetune", Training(attn_implementation=attention))
    return SampledSteps(model, LENGTHS, sample_steps(BatchPlan(64, 32, 1, 0), 2), 32)


def test_dense_attention_executes_all_pairs_of_a_pack() -> None:
    """Sixteen samples of 512 tokens in a pack of 8,192: 16 times the pairs, and both halves of them."""
    language = sampled_steps("varlen").model.shape.language
    varlen, dense = (sampled_steps(name).workload(1)(8192) for name in ("varlen", "sdpa"))
    per_pair = 2 * language.layers * language.attention_width
    assert varlen.packs == dense.packs == 2
    forward = dense.body_forward - varlen.body_forward
    assert forward == per_pair * (2 * 2 * 8192**2 - 32 * 512**2)
    assert dense.flops - varlen.flops == 3 * forward, "the backward pass costs twice the forward pass"


def test_required_flops_do_not_depend_on_the_implementation() -> None:
    """MFU divides what the model requires by the time that the implementation takes."""
    assert sampled_steps("sdpa").flops() == sampled_steps("varlen").flops()


def test_sampled_steps_are_those_of_the_plan() -> None:
    steps = sampled_steps("varlen")
    assert [len(step) for step in steps.steps] == [32, 32]
    assert dataclasses.replace(steps, steps=steps.steps[:1]).tokens == 32 * 512
