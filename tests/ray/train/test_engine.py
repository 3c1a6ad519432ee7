"""Losses, gradients and checkpoints do not depend on world size, ZeRO stage or execution settings.

The engine runs in processes under torch.distributed, without Ray. A few launches with many runs serve all tests.
"""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raylava.config.recipe import Model
from raylava.corpus.blocks import Blocks
from raylava.models.llava import PackLoss, build_llava, set_trainable, trainable_names
from raylava.models.registry import ResolvedModel
from raylava.train.batch_plan import BatchPlan
from raylava.train.checkpoints import checkpoint_weights
from raylava.train.data_loader import PackCollator
from tests.support.packs import collate_groups, loss_and_gradients
from tests.support.ranks import run_ranks

Lines = list[dict[str, Any]]
Runs = dict[str, dict[str, Any]]

SCRIPT = Path(__file__).parents[2] / "support" / "train_rank.py"
ZERO_STAGES = (0, 1, 2, 3)
SHARDED_STAGES = (1, 2, 3)
OFFLOADS = {
    "offload-2": {"stage": 2, "offload_optimizer": True},
    "offload-3": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
}


def run_engine(world_size: int, inputs: dict[str, str], runs: Runs, folder: Path) -> dict[str, Lines]:
    """Train on `world_size` ranks; return rank 0's lines by run."""
    lines = run_ranks(SCRIPT, inputs | {"runs": runs}, world_size, folder)
    return {name: [line for line in lines if line["run"] == name] for name in runs}


def at_stage(zero_stage: int, **options: Any) -> dict[str, Any]:
    return {"training": {"zero": {"stage": zero_stage}}} | options


def unclipped(zero_stage: int, **options: Any) -> dict[str, Any]:
    return {"training": {"zero": {"stage": zero_stage}, "max_grad_norm": None}} | options


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def inputs(toy_model: Model, prepared_blocks: Blocks) -> dict[str, str]:
    return {
        "language": toy_model.language.name,
        "vision": toy_model.vision.name,
        "blocks": str(prepared_blocks.folder),
    }


@pytest.fixture(scope="module")
def two_ranks(inputs: dict[str, str], folder: Path) -> dict[str, Lines]:
    runs = {f"plain-{stage}": at_stage(stage, checkpoint=str(folder / f"two-{stage}")) for stage in ZERO_STAGES}
    runs |= {f"poisoned-{stage}": at_stage(stage, poison=2) for stage in ZERO_STAGES}
    runs |= {f"long-{stage}": at_stage(stage, epochs=4) for stage in ZERO_STAGES}
    runs |= {f"long-{name}": {"training": {"zero": settings}, "epochs": 4} for name, settings in OFFLOADS.items()}
    runs |= {
        f"moments-{stage}": unclipped(stage, moments=str(folder / f"two-{stage}.safetensors"))
        for stage in SHARDED_STAGES
    }
    runs |= {f"bf16-{stage}": {"training": {"zero": {"stage": stage}, "precision": "bf16"}} for stage in ZERO_STAGES}
    runs |= {"connector": at_stage(1, stage="pretrain", checkpoint=str(folder / "connector"))}
    return run_engine(2, inputs, runs, folder)


@pytest.fixture(scope="module")
def one_rank(inputs: dict[str, str], folder: Path, two_ranks: dict[str, Lines]) -> dict[str, Lines]:
    # Compiled code comes first: DeepSpeed's changes to torch for stage 3 persist in the process and break it.
    runs = {"compiled": {"training": {"zero": {"stage": 1}, "compile": True}}}
    runs |= {f"plain-{stage}": at_stage(stage, checkpoint=str(folder / f"one-{stage}")) for stage in ZERO_STAGES}
    runs |= {"long-0": at_stage(0, epochs=4), "long-1": at_stage(1, epochs=4), "mixed-1": at_stage(1, mixed=True)}
    runs |= {"moments-1": unclipped(1, moments=str(folder / "one.safetensors"))}
    runs |= {f"dry-run-{stage}": at_stage(stage, memory_dry_run=True) for stage in ZERO_STAGES}
    runs |= {f"from-two-{stage}": at_stage(stage, resume=str(folder / f"two-{stage}")) for stage in ZERO_STAGES}
    runs |= {
        name: {"training": {"zero": {"stage": 1}, **settings}}
        for name, settings in {
            "recomputed": {"activation_checkpointing": True},
            "auto": {"activation_checkpointing": "auto", "max_tokens_per_pack": "auto", "zero": {"stage": "auto"}},
        }.items()
    }
    runs |= {
        name: {"training": {"zero": {"stage": 1}, "attn_implementation": name}, "count_attention": True}
        for name in ("varlen", "sdpa", "eager")
    }
    return run_engine(1, inputs, runs, folder)


@pytest.fixture(scope="module")
def two_ranks_resumed(
    inputs: dict[str, str], folder: Path, two_ranks: dict[str, Lines], one_rank: dict[str, Lines]
) -> dict[str, Lines]:
    runs = {f"resumed-{stage}": at_stage(stage, resume=str(folder / f"two-{stage}")) for stage in ZERO_STAGES}
    runs |= {f"from-one-{stage}": at_stage(stage, resume=str(folder / f"one-{stage}")) for stage in ZERO_STAGES}
    runs |= {"auto": {"training": {"zero": {"stage": "auto"}}, "resume": str(folder / "two-2")}}
    return run_engine(2, inputs, runs, folder)


@pytest.fixture(scope="module")
def three_ranks(inputs: dict[str, str], folder: Path) -> dict[str, Lines]:
    return run_engine(3, inputs, {f"mixed-{stage}": at_stage(stage, mixed=True) for stage in SHARDED_STAGES}, folder)


def losses(lines: Lines) -> list[float]:
    return [line["loss"] for line in lines]


def grad_norms(lines: Lines) -> list[float]:
    return [line["grad_norm"] for line in lines]


@pytest.mark.parametrize("run", [*(f"long-{stage}" for stage in ZERO_STAGES), *(f"long-{name}" for name in OFFLOADS)])
def test_two_ranks_at_every_zero_stage_and_offload_reproduce_the_losses_of_one_rank(
    run: str, one_rank: dict[str, Lines], two_ranks: dict[str, Lines]
) -> None:
    reference = one_rank["long-0"]
    assert len(two_ranks[run]) == len(reference) == 24
    assert losses(two_ranks[run]) == pytest.approx(losses(reference), rel=1e-4)
    if run != "long-0":  # DeepSpeed does not report the norm at stage 0 in fp32
        assert grad_norms(two_ranks[run]) == pytest.approx(grad_norms(one_rank["long-1"]), rel=1e-3)


@pytest.mark.parametrize("stage", SHARDED_STAGES)
def test_applied_gradient_of_two_ranks_equals_the_sum_over_unpacked_samples(
    stage: int,
    folder: Path,
    two_ranks: dict[str, Lines],
    one_rank: dict[str, Lines],
    resolved_model: ResolvedModel,
    prepared_blocks: Blocks,
    pack_collator: PackCollator,
) -> None:
    model = PackLoss(build_llava(resolved_model, seed=0, dtype=torch.float32)).eval()
    samples = next(BatchPlan(len(prepared_blocks), 8, epochs=1, seed=0).from_step(0)).samples
    unpacked = collate_groups(prepared_blocks, pack_collator, [[int(number)] for number in samples])
    _, gradients = loss_and_gradients(model, unpacked)
    loss_tokens = int(prepared_blocks.lengths.loss_tokens[samples].sum())
    for file in (f"two-{stage}.safetensors", "one.safetensors"):
        moments = load_file(folder / file)
        assert set(moments) == {name.removeprefix("llava.") for name in gradients}
        for name, gradient in gradients.items():
            expected = 0.1 * gradient / loss_tokens
            moment = moments[name.removeprefix("llava.")]
            atol = 1e-5 * float(expected.abs().max())  # sums that cancel retain the rounding of their terms
            torch.testing.assert_close(moment, expected, rtol=1e-5, atol=atol, msg=name)


@pytest.mark.parametrize("stage", SHARDED_STAGES)
def test_ranks_with_text_only_images_only_and_both_run_the_same_collectives(
    stage: int, one_rank: dict[str, Lines], three_ranks: dict[str, Lines]
) -> None:
    mixed = three_ranks[f"mixed-{stage}"]
    assert len(mixed) == 4
    assert losses(mixed) == pytest.approx(losses(one_rank["mixed-1"]), rel=1e-4)


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_resume_on_the_same_world_size_is_bitwise_identical(
    stage: int, two_ranks: dict[str, Lines], two_ranks_resumed: dict[str, Lines]
) -> None:
    uninterrupted, resumed = two_ranks[f"plain-{stage}"], two_ranks_resumed[f"resumed-{stage}"]
    assert losses(resumed) == losses(uninterrupted)[3:]
    assert uninterrupted[-1]["weights"] == resumed[-1]["weights"]


@pytest.mark.parametrize("stage", ZERO_STAGES)
@pytest.mark.parametrize("run", ["from-two", "from-one"])
def test_resume_on_another_world_size_restores_the_optimizer_state(
    stage: int, run: str, one_rank: dict[str, Lines], two_ranks_resumed: dict[str, Lines]
) -> None:
    """If Adam's moments or its step counter were reset, losses would differ by one per cent."""
    resumed = (one_rank if run == "from-two" else two_ranks_resumed)[f"{run}-{stage}"]
    assert losses(resumed) == pytest.approx(losses(one_rank[f"plain-{stage}"])[3:], rel=1e-4)


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_non_finite_step_is_skipped_by_all_ranks_and_training_continues(
    stage: int, two_ranks: dict[str, Lines]
) -> None:
    lines = two_ranks[f"poisoned-{stage}"]
    assert [line["skipped"] for line in lines] == [False, False, True, False, False, False]
    assert math.isnan(lines[2]["loss"])
    assert all(math.isfinite(line["loss"]) for line in lines[3:])
    assert lines[5]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_memory_dry_run_does_not_change_training(stage: int, one_rank: dict[str, Lines]) -> None:
    plain, with_dry_run = one_rank[f"plain-{stage}"], one_rank[f"dry-run-{stage}"]
    assert losses(plain) == losses(with_dry_run)
    assert plain[-1]["weights"] == with_dry_run[-1]["weights"]


@pytest.mark.parametrize("run", ["recomputed", "auto", "compiled"])
def test_activation_checkpointing_auto_and_compile_reproduce_the_losses(run: str, one_rank: dict[str, Lines]) -> None:
    assert losses(one_rank[run]) == pytest.approx(losses(one_rank["plain-1"]), rel=1e-4)


@pytest.mark.parametrize("name", ["varlen", "sdpa", "eager"])
def test_each_step_computes_attention_by_the_implementation_of_the_recipe(
    name: str, one_rank: dict[str, Lines], resolved_model: ResolvedModel
) -> None:
    """Per layer, varlen calls the causal kernel once for each sample, sdpa one with a mask for each pack."""
    layers = resolved_model.language.shape.layers
    for line in one_rank[name]:
        expected = {"varlen": [0, line["samples"]], "sdpa": [line["packs"], 0], "eager": [0, 0]}[name]
        assert line["attention_calls"] == [layers * calls for calls in expected]
        assert line["mechanisms"]["attention"].startswith(f"{name}, vision tower ")
    assert losses(one_rank[name]) == pytest.approx(losses(one_rank["plain-1"]), rel=1e-5)


@pytest.mark.parametrize(
    ("run", "mechanism", "description"),
    [
        ("compiled", "compile", "on"),
        ("plain-1", "compile", "off"),
        ("recomputed", "activation checkpointing", "on"),
        ("plain-1", "activation checkpointing", "off"),
        ("plain-1", "gradient clipping", "norm 1"),
        ("moments-1", "gradient clipping", "off"),
        ("plain-0", "ZeRO", "stage 0, 1 ranks"),
        ("plain-3", "ZeRO", "stage 3, 1 ranks"),
        ("plain-2", "offload", "off"),
        ("plain-2", "overlap of communication", "off"),
    ],
)
def test_mechanisms_are_read_from_the_engine(
    run: str, mechanism: str, description: str, one_rank: dict[str, Lines]
) -> None:
    assert one_rank[run][0]["mechanisms"][mechanism] == description


@pytest.mark.parametrize(
    ("run", "description"), [("offload-2", "optimizer states"), ("offload-3", "optimizer states, parameters")]
)
def test_offloaded_states_are_on_the_host(run: str, description: str, two_ranks: dict[str, Lines]) -> None:
    assert two_ranks[f"long-{run}"][0]["mechanisms"]["offload"] == description


def test_only_what_trains_is_optimized(one_rank: dict[str, Lines], two_ranks: dict[str, Lines]) -> None:
    assert re.fullmatch(
        r"AdamW: connector [\d,]+ values at 0.001, weight decay 0.01; connector [\d,]+ values at 0.001",
        two_ranks["connector"][0]["mechanisms"]["optimizer"],
    )
    assert "language" in one_rank["plain-1"][0]["mechanisms"]["optimizer"]


def test_weights_of_a_checkpoint_are_read_whole_at_every_zero_stage(
    folder: Path, one_rank: dict[str, Lines], two_ranks: dict[str, Lines], resolved_model: ResolvedModel
) -> None:
    """These are what `keep_best` exports. All runs take the same steps."""
    trained = build_llava(resolved_model, seed=0, dtype=torch.float32)
    set_trainable(trained, "finetune")
    expected = checkpoint_weights(folder / "one-0")
    tied = {"lm_head.weight"}  # a second name of the embeddings
    assert expected.keys() - tied == trainable_names(trained) - tied
    for checkpoint in (*(f"two-{stage}" for stage in ZERO_STAGES), "one-3"):
        weights = checkpoint_weights(folder / checkpoint)
        for name in expected.keys() - tied:
            torch.testing.assert_close(weights[name].float(), expected[name].float(), rtol=1e-3, atol=1e-5, msg=name)


def test_auto_selects_the_fastest_configuration_that_fits(one_rank: dict[str, Lines]) -> None:
    """A single rank with enough memory has nothing to shard and no reason to recompute."""
    config = one_rank["auto"][0]["execution_config"]
    assert config["zero_stage"] == 0
    assert config["activation_checkpointing"] is False
    assert config["offload_optimizer"] is False


def test_out_of_memory_advice_names_every_setting_of_the_smaller_configuration(one_rank: dict[str, Lines]) -> None:
    advice = one_rank["plain-0"][0]["advice"]
    for setting in ("stage", "offload_optimizer", "offload_parameters"):
        assert f"finetune.zero.{setting}=" in advice
    assert "finetune.activation_checkpointing=" in advice
    assert "finetune.max_tokens_per_pack=" in advice


def test_resume_with_auto_zero_stage_keeps_the_stage_of_the_checkpoint(two_ranks_resumed: dict[str, Lines]) -> None:
    """No other stage can load the checkpoint, whichever one `auto` would select now."""
    lines = two_ranks_resumed["auto"]
    assert lines[0]["execution_config"]["zero_stage"] == 2
    assert losses(lines) == losses(two_ranks_resumed["resumed-2"])


def test_out_of_memory_is_reported_before_the_first_step_with_the_remedy(inputs: dict[str, str], folder: Path) -> None:
    (line,) = run_engine(1, inputs, {"starved": at_stage(1, starve=True)}, folder)["starved"]
    assert line["message"].startswith("out of memory in the dry run of the worst-case packs (up to ")
    assert "images): use less (" in line["message"]


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_bf16_reproduces_the_losses_of_fp32_within_rounding(stage: int, two_ranks: dict[str, Lines]) -> None:
    assert losses(two_ranks[f"bf16-{stage}"]) == pytest.approx(losses(two_ranks["plain-1"]), rel=0.02)


def test_connector_checkpoint_contains_only_the_connector_and_its_moments(
    resolved_model: ResolvedModel, folder: Path, two_ranks: dict[str, Lines]
) -> None:
    connector = build_llava(resolved_model, seed=0, dtype=torch.float32).model.multi_modal_projector
    parameters = sum(weight.numel() for weight in connector.parameters())
    stored = [_count_values(torch.load(file, weights_only=False)) for file in (folder / "connector").rglob("*.pt")]
    # The weights, ZeRO's copy of them and Adam's two moments, with a little padding and counters.
    assert 4 * parameters <= sum(stored) < 4 * parameters + 200


def _count_values(state: Any) -> int:
    """Return the number of tensor elements in nested containers."""
    if isinstance(state, torch.Tensor):
        return state.numel()
    items = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return sum(_count_values(item) for item in items)
