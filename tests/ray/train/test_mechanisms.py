"""What a training stage promises is in force in the product's own Trainer, in this process."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raylava.config.recipe import CheckpointConfig, Training, ZeroConfig
from raylava.corpus.blocks import Blocks
from raylava.models.connector import CONNECTOR, CONNECTOR_FILE, TRAINED_CONNECTOR, connector_factor
from raylava.models.registry import ResolvedModel
from raylava.train.engine import DryRunOutOfMemoryError, Engine
from raylava.train.spec import TrainSpec
from tests.support.attention import AttentionCalls
from tests.support.recorded_training import build_trainer, record_training

pytestmark = pytest.mark.usefixtures("single_rank")


@pytest.fixture
def spec(resolved_model: ResolvedModel, prepared_blocks: Blocks, tmp_path: Path) -> TrainSpec:
    """Four steps of eight samples."""
    training = Training(
        global_batch_size=8, max_steps=4, lr=1e-3, max_grad_norm=1.0, precision="fp32", max_tokens_per_pack=384
    )
    return TrainSpec("finetune", resolved_model, training, 0, str(prepared_blocks.folder), None, "pad", str(tmp_path))


def with_training(spec: TrainSpec, **settings: object) -> TrainSpec:
    return dataclasses.replace(spec, training=spec.training.model_copy(update=settings))


def test_packs_hold_several_samples(spec: TrainSpec) -> None:
    trainer, _ = build_trainer(spec)
    trainer._build_engine(None)
    (batch, *_) = trainer._build_loader(0)
    assert len(batch.packs) < len(batch.step.samples)
    assert max(len(pack.cu_seqlens) - 1 for pack in batch.packs) > 1


def test_memory_dry_run_computes_the_worst_case_packs(spec: TrainSpec) -> None:
    trainer, _ = build_trainer(spec)
    trainer._build_engine(None)
    with AttentionCalls() as calls:
        description = trainer._memory_dry_run()
    assert description.startswith("3 packs of up to ")
    assert calls.causal >= 3 * spec.model.language.shape.layers


def test_auto_settings_that_run_out_of_memory_are_rejected_for_a_smaller_configuration(
    spec: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dry run of each configuration fails, until the recipe allows none that needs less memory."""

    def fail(*_: object) -> None:
        raise DryRunOutOfMemoryError("out of memory")

    monkeypatch.setattr(Engine, "memory_dry_run", fail)
    auto = with_training(spec, zero=ZeroConfig(stage="auto"), activation_checkpointing="auto")
    peaks = []
    while True:
        trainer, backend = build_trainer(auto)
        with pytest.raises(DryRunOutOfMemoryError):
            trainer.run()
        peaks.append(trainer._resolved.candidate.memory.peak)
        if not backend.rejected:
            break
        assert backend.rejected == [trainer._resolved.candidate.config]
        auto = dataclasses.replace(auto, rejected_configs=(*auto.rejected_configs, *backend.rejected))
    assert len(peaks) >= 2
    assert peaks == sorted(set(peaks), reverse=True)


def test_settings_without_auto_are_never_rejected(spec: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Engine, "_accumulate", fail)
    trainer, backend = build_trainer(spec)
    with pytest.raises(DryRunOutOfMemoryError, match="out of memory in the dry run of the worst-case packs"):
        trainer.run()
    assert not backend.rejected


def test_run_reports_its_dry_run_and_every_mechanism_before_the_first_step(spec: TrainSpec) -> None:
    result = record_training(spec)
    mechanisms = result["mechanisms"]
    assert mechanisms["memory dry run"].startswith("3 packs")
    assert mechanisms["exported weights"] == "after the last step"
    assert result["lines"] == [f"{name}: {text}" for name, text in mechanisms.items() if name != "exported weights"]
    assert set(mechanisms) == {
        "attention",
        "image features",
        "logits",
        "optimizer",
        "gradient clipping",
        "compile",
        "deterministic algorithms",
        "activation checkpointing",
        "ZeRO",
        "offload",
        "overlap of communication",
        "batches",
        "packing",
        "data loader threads",
        "memory dry run",
        "checkpoints",
        "exported weights",
    }


def test_engine_refuses_a_model_that_runs_another_attention_than_the_recipe(spec: TrainSpec) -> None:
    trainer, _ = build_trainer(spec)
    trainer._llava.set_attn_implementation({"text_config": "sdpa"})
    with pytest.raises(AssertionError, match="the language model runs sdpa instead of varlen"):
        trainer._build_engine(None)


def test_run_without_a_due_checkpoint_saves_one_halfway(spec: TrainSpec) -> None:
    assert record_training(spec)["saved"] == [2]


def test_checkpoints_are_saved_at_the_interval(spec: TrainSpec) -> None:
    assert record_training(with_training(spec, checkpoint=CheckpointConfig(interval_steps=1)))["saved"] == [1, 2, 3]
    assert record_training(with_training(spec, checkpoint=CheckpointConfig(interval_minutes=1e-9)))["saved"] == [
        1,
        2,
        3,
    ]


def test_samples_of_a_step_depend_on_the_seed(spec: TrainSpec) -> None:
    """The connector's initialization does as well; here only the order of the samples is compared."""
    orders = [
        [line["samples_sha256"] for line in record_training(dataclasses.replace(spec, seed=seed))["step log"]]
        for seed in (0, 1)
    ]
    assert orders[0] != orders[1]


def test_learning_rate_of_each_step_is_the_one_that_the_optimizer_uses(spec: TrainSpec) -> None:
    rates = [rate for _, _, rate, _ in record_training(spec)["steps"]]
    assert rates[0] == pytest.approx(1e-3)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 3e-4, "a cosine decays to zero"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_connector_of_a_bf16_run_is_kept_in_fp32_at_every_zero_stage(spec: TrainSpec, stage: int) -> None:
    """The export folds the scale into these, the optimizer's weights, and rounds once."""
    record_training(with_training(spec, precision="bf16", zero=ZeroConfig(stage=stage)))
    folder = Path(spec.output)
    trained = load_file(folder / TRAINED_CONNECTOR / CONNECTOR_FILE)
    exported = load_file(folder / "model.safetensors")
    factor = connector_factor(folder / TRAINED_CONNECTOR / CONNECTOR_FILE)
    weight = trained[f"{CONNECTOR}linear_2.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float()), "bf16 would have lost digits"
    assert torch.equal(exported["multi_modal_projector.linear_2.weight"], (weight * factor).bfloat16())


def test_gradients_above_the_norm_are_clipped(spec: TrainSpec) -> None:
    clipped, free = (record_training(with_training(spec, max_grad_norm=norm))["steps"] for norm in (1e-3, None))
    assert clipped[0] == free[0] or clipped[0][1] == free[0][1], "the first loss precedes any update"
    assert clipped[0][3] > 1e-3, "the reported norm is that before clipping"
    assert [loss for _, loss, *_ in clipped] != [loss for _, loss, *_ in free]
