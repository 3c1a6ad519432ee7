"""A training step waits for the device once on raylava's account, and where DeepSpeed 0.19.8 is known to."""

import dataclasses
from pathlib import Path

import pytest
import torch

from raylava.config.recipe import Training, ZeroConfig
from raylava.corpus.blocks import Blocks
from raylava.models.registry import ResolvedModel
from raylava.train.spec import TrainSpec
from tests.support.host_reads import HostReads
from tests.support.recorded_training import build_trainer

pytestmark = pytest.mark.usefixtures("single_rank")

ON_THE_HOST = ("loop_attention", "longest_sample")  # read the lengths of the pack's samples, which stay there
INVALID_NORM = "utils.py:233 is_invalid_grad_norm"
# Places in DeepSpeed 0.19.8, by ZeRO stage. torch's AdamW for CPUs reads its step counter in the line that calls it;
# the fused one of GPUs does not.
DEEPSPEED = {
    0: {
        "utils.py:293 has_overflow_serial",  # once per weight
        "utils.py:323 has_overflow",
        "utils.py:582 get_weight_norm",
        "utils.py:585 get_weight_norm",
        "fp16/unfused_optimizer.py:230 step",  # calls the optimizer
    },
    1: {
        "zero/stage_1_and_2.py:3248 has_overflow",
        INVALID_NORM,
        "zero/stage_1_and_2.py:2983 _optimizer_step",  # calls the optimizer
    },
    2: {
        "zero/stage_1_and_2.py:3248 has_overflow",
        INVALID_NORM,
        "zero/stage_1_and_2.py:2983 _optimizer_step",  # calls the optimizer
    },
    3: {INVALID_NORM, "zero/stage3.py:1245 step_with_gradscaler"},  # the latter calls the optimizer
}


def reads_of_a_step(spec: TrainSpec, zero_stage: int, monkeypatch: pytest.MonkeyPatch) -> HostReads:
    """Return the reads of the second step, which has several packs; the first one allocates."""
    synchronized: list[str] = []
    for name in ("synchronize", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: synchronized.append(name))
    training = spec.training.model_copy(update={"zero": ZeroConfig(stage=zero_stage)})
    trainer, _ = build_trainer(dataclasses.replace(spec, training=training))
    trainer._build_engine(None)
    first, second, *_ = trainer._build_loader(0)
    assert len(second.packs) > 1
    trainer._engine.step(0, first.packs)
    with HostReads() as reads:
        trainer._engine.step(1, second.packs)
    assert not synchronized
    return reads


@pytest.fixture
def spec(resolved_model: ResolvedModel, prepared_blocks: Blocks, tmp_path: Path) -> TrainSpec:
    """Steps of eight samples in bf16, with clipping."""
    training = Training(global_batch_size=8, max_steps=2, lr=1e-3, max_grad_norm=1.0, max_tokens_per_pack=256)
    return TrainSpec("finetune", resolved_model, training, 0, str(prepared_blocks.folder), None, "pad", str(tmp_path))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_step_waits_for_the_device_once_and_where_deepspeed_does(
    spec: TrainSpec, zero_stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = reads_of_a_step(spec, zero_stage, monkeypatch)
    functions = [place.split()[1] for place in reads.of("raylava")]
    assert [function for function in functions if function not in ON_THE_HOST] == ["_update"]
    assert set(reads.of("deepspeed")) == {f"deepspeed/runtime/{place}" for place in DEEPSPEED[zero_stage]}
