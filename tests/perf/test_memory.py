"""What a step is said to hold and to send is what a run of two ranks allocates and sends (issue 8: ≤ 10 % off)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, GemmaConfig

from raylava.models.shapes import LANGUAGE, VISION
from raylava.perf.memory import ExecutionConfig, Memory, PackShape, TrainableModel, checkpoint_bytes, memory
from raylava.perf.shapes import LlavaShape, language_shape, vision_shape
from raylava.perf.traffic import traffic

SIZES: dict[str, Any] = {
    "language": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 2048,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "vision": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 112,
        "patch_size": 14,
    },
}
SAMPLES = [(256, 1, 50)] * 4
LOAD, WORLD = PackShape(tokens=1024, loss_tokens=200, images=4), 2
# By name: stage, precision, ZeRO stage, whether activations are recomputed. Stage 3 last: what DeepSpeed does to torch
# for it stays with the process.
RUNS: dict[str, tuple[str, str, int, bool]] = {
    f"{stage}-{precision}-{zero}{'-recomputed' if activation_checkpointing else ''}": (
        stage,
        precision,
        zero,
        activation_checkpointing,
    )
    for stage, precision, zero, activation_checkpointing in (
        ("finetune", "bf16", 0, False),
        ("finetune", "bf16", 0, True),
        ("finetune", "bf16", 1, False),
        ("finetune", "bf16", 2, False),
        ("finetune", "bf16", 2, True),
        ("finetune", "fp32", 2, True),
        ("pretrain", "bf16", 2, True),
        ("finetune", "bf16", 3, False),
        ("finetune", "bf16", 3, True),
        ("pretrain", "bf16", 3, False),
        ("pretrain", "bf16", 3, True),
    )
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks allocated and sent, by run."""
    shared = {
        "world_size": WORLD,
        "rendezvous": str(tmp_path_factory.mktemp("memory") / "rendezvous"),
        "model": SIZES,
        "samples": SAMPLES,
        "runs": {name: {"stage": run[0], "training": training(*run[1:])} for name, run in RUNS.items()},
    }
    script = str(Path(__file__).parent / "rank.py")
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, json.dumps(shared | {"rank": rank})],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for rank in range(WORLD)
    ]
    output = ranks[0].communicate(timeout=400)[0]
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {line["run"]: line for line in lines}


def training(precision: str, zero: int, activation_checkpointing: bool) -> dict[str, Any]:
    return {"precision": precision, "zero": {"stage": zero}, "activation_checkpointing": activation_checkpointing}


def model_of(run: tuple[str, str, int, bool]) -> TrainableModel:
    vision = CLIPVisionConfig(**SIZES["vision"])
    shape = LlavaShape(language_shape(GemmaConfig(**SIZES["language"]).to_dict()), vision_shape(vision.to_dict(), 112))
    return TrainableModel(shape, run[0] == "finetune", vision=False, value=2 if run[1] == "bf16" else 4)


def way_of(run: tuple[str, str, int, bool]) -> ExecutionConfig:
    return ExecutionConfig(
        run[2],
        offload_optimizer=False,
        offload_parameters=False,
        activation_checkpointing=run[3],
        max_tokens_per_pack=1024,
    )


def predicted(name: str) -> Memory:
    return memory(model_of(RUNS[name]), way_of(RUNS[name]), LOAD, WORLD)


@pytest.mark.parametrize("name", RUNS)
def test_what_lies_there_between_steps_is_what_a_run_keeps(name: str, measured: dict[str, Any]) -> None:
    assert predicted(name).rest == pytest.approx(measured[name]["rest"], rel=0.02)


@pytest.mark.parametrize("name", RUNS)
def test_the_most_that_is_held_is_what_a_run_allocates(name: str, measured: dict[str, Any]) -> None:
    assert predicted(name).peak == pytest.approx(measured[name]["peak"], rel=0.1)


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run[0] == "finetune" and not run[3]])
@pytest.mark.parametrize("packs", [1, 2])
def test_what_is_sent_is_what_collectives_work_on(name: str, packs: int, measured: dict[str, Any]) -> None:
    sent = measured[name]["sent"][packs - 1]
    ours = traffic(model_of(RUNS[name]), way_of(RUNS[name]), packs, WORLD)
    found = (ours.all_reduce, ours.all_gather, ours.reduce_scatter)
    theirs = [sent.get(one, 0) for one in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")]
    # Beside scalars; at stage 3 weights below 100,000 values are gathered once a step, not with each pack.
    small = 0.15 if RUNS[name][2] == 3 else 1e-3
    for mine, real in zip(found, theirs, strict=True):
        assert mine == pytest.approx(real, rel=small, abs=1000)


def gemma(name: str) -> TrainableModel:
    vision = vision_shape(VISION["openai/clip-vit-large-patch14-336"], 336)
    return TrainableModel(LlavaShape(language_shape(LANGUAGE[name]), vision), language=True, vision=False, value=2)


MODELS = st.sampled_from([gemma("google/gemma-2b-it"), gemma("google/gemma-7b-it")])
LOADS = st.builds(lambda tokens: PackShape(tokens, tokens // 5, tokens // 700 + 1), st.integers(512, 32_768))


@given(MODELS, LOADS, st.integers(1, 3), st.sampled_from([2, 8, 64]), st.booleans())
def test_more_workers_never_need_more_of_each(
    model: TrainableModel, load: PackShape, zero: int, workers: int, activation_checkpointing: bool
) -> None:
    way = ExecutionConfig(zero, False, False, activation_checkpointing, load.tokens)
    assert memory(model, way, load, 2 * workers).peak <= memory(model, way, load, workers).peak


@given(MODELS, LOADS, st.integers(0, 3), st.sampled_from([1, 8, 64]))
def test_recomputing_keeps_less_from_the_forward_pass_and_longer_packs_more(
    model: TrainableModel, load: PackShape, zero: int, workers: int
) -> None:
    plain, again = (
        memory(model, ExecutionConfig(zero, False, False, activation_checkpointing, load.tokens), load, workers)
        for activation_checkpointing in (False, True)
    )
    assert again.peak <= plain.peak
    longer = PackShape(2 * load.tokens, 2 * load.loss_tokens, 2 * load.images)
    assert memory(model, ExecutionConfig(zero, False, False, False, longer.tokens), longer, workers).peak >= plain.peak


@given(MODELS, LOADS, st.integers(1, 3))
def test_what_is_offloaded_is_on_the_host(model: TrainableModel, load: PackShape, zero: int) -> None:
    plain, offloaded = (
        memory(model, ExecutionConfig(zero, host, False, False, load.tokens), load, 8) for host in (False, True)
    )
    assert offloaded.host == plain.optimizer
    assert offloaded.peak < plain.peak


def test_a_checkpoint_holds_what_trains_its_copy_and_two_moments() -> None:
    model = gemma("google/gemma-2b-it")
    assert checkpoint_bytes(model, ExecutionConfig(2, False, False, False, 4096)) == model.parameters * (2 + 4 + 4 + 4)
