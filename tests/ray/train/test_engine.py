"""A step's loss is the sum over supervised tokens divided by their number, however samples are packed or sharded."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from raylava.config.recipe import Model, Training
from raylava.corpus.blocks import Blocks
from raylava.models.llava import (
    CONNECTOR,
    VISION_TOWER,
    PackLoss,
    PackTensors,
    build_llava,
    set_trainable,
    trainable_names,
)
from raylava.models.registry import VisionSpec
from raylava.train.batch_plan import BatchPlan
from raylava.train.data_loader import PackCollator
from raylava.train.engine import deepspeed_config, lr_multiplier, parameter_groups


@pytest.fixture(scope="module", params=["varlen", "sdpa", "eager"])
def model(toy_model: Model, vision: VisionSpec, request: pytest.FixtureRequest) -> PackLoss:
    return PackLoss(build_llava(toy_model, vision, seed=0, dtype=torch.float32, attention=request.param)).eval()


@pytest.fixture(scope="module")
def plain_llava(toy_model: Model, vision: VisionSpec) -> LlavaForConditionalGeneration:
    """The model of the `model` fixture as transformers computes it."""
    return build_llava(toy_model, vision, seed=0, dtype=torch.float32).eval()


def packs_of(blocks: Blocks, layout: PackCollator, groups: list[list[int]]) -> list[PackTensors]:
    return [layout.tensors([blocks[number] for number in group]) for group in groups]


def gradients(model: PackLoss, packs: list[PackTensors]) -> tuple[float, dict[str, torch.Tensor]]:
    set_trainable(model.llava, "finetune")
    model.zero_grad()
    total = torch.zeros(())
    for pack in packs:
        loss = model(**vars(pack))
        loss.backward()
        total += loss.detach()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return float(total), found


def test_packed_logits_equal_those_of_each_sample_alone(
    model: PackLoss, plain_llava: LlavaForConditionalGeneration, prepared_blocks: Blocks, blocks_layout: PackCollator
) -> None:
    numbers = [0, 1, 2, 3]
    with torch.inference_mode():
        (packed,) = packs_of(prepared_blocks, blocks_layout, [numbers])
        together = model.logits(
            packed.input_ids, packed.position_ids, packed.pixel_values, packed.target_positions, packed.cu_seqlens
        )
        alone = [
            plain_llava(input_ids=pack.input_ids, pixel_values=pack.pixel_values).logits[0, pack.target_positions]
            for pack in packs_of(prepared_blocks, blocks_layout, [[number] for number in numbers])
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_the_whole_rows_logits(
    model: PackLoss, plain_llava: LlavaForConditionalGeneration, prepared_blocks: Blocks, blocks_layout: PackCollator
) -> None:
    """Computing logits at supervised positions only changes nothing: compare with transformers' own forward and
    labels.
    """
    (pack,) = packs_of(prepared_blocks, blocks_layout, [[5]])
    labels = torch.full_like(pack.input_ids, -100)
    labels[0, pack.target_positions + 1] = pack.labels
    with torch.inference_mode():
        ours = model(**vars(pack)) / len(pack.labels)
        theirs = plain_llava(input_ids=pack.input_ids, pixel_values=pack.pixel_values, labels=labels).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_do_not_depend_on_packing(
    model: PackLoss, prepared_blocks: Blocks, blocks_layout: PackCollator
) -> None:
    one_a_row = [[number] for number in range(6)]
    loss, expected = gradients(model, packs_of(prepared_blocks, blocks_layout, one_a_row))
    for groups in ([[0, 1, 2, 3, 4, 5]], [[5, 0], [3, 2, 4], [1]], [*one_a_row, []]):
        packed_loss, found = gradients(model, packs_of(prepared_blocks, blocks_layout, groups))
        assert packed_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-5, msg=name)


def test_pretraining_trains_the_connector_and_finetuning_also_the_language_model(model: PackLoss) -> None:
    set_trainable(model.llava, "pretrain")
    assert {name.startswith(CONNECTOR) for name in trainable_names(model.llava)} == {True}
    assert len(trainable_names(model.llava)) == 4
    set_trainable(model.llava, "finetune")
    frozen = {name for name, _ in model.llava.named_parameters()} - trainable_names(model.llava)
    assert frozen == {name for name, _ in model.llava.named_parameters() if name.startswith(VISION_TOWER)}


def test_a_connector_is_drawn_from_its_seed_alone(toy_model: Model, vision: VisionSpec) -> None:
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(len(os.urandom(1)) + seed * 31)  # the global state must not matter
        return build_llava(toy_model, vision, seed, torch.float32).model.multi_modal_projector.linear_1.weight

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


SCHEDULE = Training(lr=1.0, warmup_ratio=0.1, lr_schedule="cosine")


def test_the_rate_warms_up_and_then_falls_as_a_cosine_to_zero() -> None:
    rates = [lr_multiplier(step, 100, SCHEDULE) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[99] < 1e-3


@pytest.mark.parametrize(("kind", "middle", "end"), [("linear", 0.5, 1 / 90), ("constant", 1.0, 1.0)])
def test_other_schedules(kind: str, middle: float, end: float) -> None:
    training = SCHEDULE.model_copy(update={"lr_schedule": kind})
    assert lr_multiplier(55, 100, training) == pytest.approx(middle)
    assert lr_multiplier(99, 100, training) == pytest.approx(end)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert lr_multiplier(0, 10, SCHEDULE.model_copy(update={"warmup_ratio": 0.0})) == 1.0


# ZeRO, for real: processes of their own under torch.distributed, without Ray. Three launches serve all the tests below.

Lines = list[dict[str, Any]]
Runs = dict[str, dict[str, Any]]

STAGES = (0, 1, 2, 3)
ZERO_STAGES = (1, 2, 3)  # those that shard
OFFLOADS = {
    "offload-2": {"stage": 2, "offload_optimizer": True},
    "offload-3": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
}


def run_ranks(world_size: int, backbones: dict[str, str], runs: Runs, folder: Path) -> dict[str, Lines]:
    """What rank 0 printed of each run on so many ranks."""
    script = Path(__file__).parent / "rank.py"
    given = backbones | {
        "world_size": world_size,
        "rendezvous": str(folder / f"rendezvous-{os.urandom(4).hex()}"),
        "runs": runs,
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), json.dumps(given | {"rank": rank})],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [rank.communicate(timeout=400) for rank in ranks]
    for rank, (_, error) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, error[-3000:]
    lines = [json.loads(line) for line in outputs[0][0].splitlines() if line.startswith("{")]
    return {name: [line for line in lines if line["run"] == name] for name in runs}


def zero(zero_stage: int, **others: Any) -> dict[str, Any]:
    return {"training": {"zero": {"stage": zero_stage}}} | others


def unclipped(zero_stage: int, **others: Any) -> dict[str, Any]:
    return {"training": {"zero": {"stage": zero_stage}, "max_grad_norm": None}} | others


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def backbones(toy_model: Model, prepared_blocks: Blocks) -> dict[str, str]:
    return {
        "language": toy_model.language.name,
        "vision": toy_model.vision.name,
        "blocks": str(prepared_blocks.folder),
    }


@pytest.fixture(scope="module")
def on_two(backbones: dict[str, str], folder: Path) -> dict[str, Lines]:
    runs = {f"plain-{stage}": zero(stage, checkpoint=str(folder / f"two-{stage}")) for stage in STAGES}
    runs |= {f"poisoned-{stage}": zero(stage, poison=2) for stage in STAGES}
    runs |= {f"long-{stage}": zero(stage, epochs=4) for stage in STAGES}
    runs |= {f"long-{name}": {"training": {"zero": settings}, "epochs": 4} for name, settings in OFFLOADS.items()}
    runs |= {
        f"moments-{stage}": unclipped(stage, moments=str(folder / f"two-{stage}.safetensors")) for stage in ZERO_STAGES
    }
    runs |= {f"bf16-{stage}": {"training": {"zero": {"stage": stage}, "precision": "bf16"}} for stage in STAGES}
    runs |= {"connector": zero(1, stage="pretrain", checkpoint=str(folder / "connector"))}
    return run_ranks(2, backbones, runs, folder)


@pytest.fixture(scope="module")
def on_one(backbones: dict[str, str], folder: Path, on_two: dict[str, Lines]) -> dict[str, Lines]:
    # Compiled code first: what DeepSpeed's stage 3 does to torch stays with the process and breaks it.
    runs = {"compiled": {"training": {"zero": {"stage": 1}, "compile": True}}}
    runs |= {f"plain-{stage}": zero(stage, checkpoint=str(folder / f"one-{stage}")) for stage in STAGES}
    runs |= {"long-0": zero(0, epochs=4), "long-1": zero(1, epochs=4), "mixed-1": zero(1, mixed=True)}
    runs |= {"moments-1": unclipped(1, moments=str(folder / "one.safetensors"))}
    runs |= {f"rehearsed-{stage}": zero(stage, memory_dry_run=True) for stage in STAGES}
    runs |= {f"from-two-{stage}": zero(stage, resume=str(folder / f"two-{stage}")) for stage in STAGES}
    runs |= {
        name: {"training": {"zero": {"stage": 1}, **settings}}
        for name, settings in {
            "recomputed": {"activation_checkpointing": True},
            "auto": {"activation_checkpointing": "auto", "max_tokens_per_pack": "auto", "zero": {"stage": "auto"}},
        }.items()
    }
    return run_ranks(1, backbones, runs, folder)


@pytest.fixture(scope="module")
def again_on_two(
    backbones: dict[str, str], folder: Path, on_two: dict[str, Lines], on_one: dict[str, Lines]
) -> dict[str, Lines]:
    runs = {f"resumed-{stage}": zero(stage, resume=str(folder / f"two-{stage}")) for stage in STAGES}
    runs |= {f"from-one-{stage}": zero(stage, resume=str(folder / f"one-{stage}")) for stage in STAGES}
    runs |= {"left-open": {"training": {"zero": {"stage": "auto"}}, "resume": str(folder / "two-2")}}
    return run_ranks(2, backbones, runs, folder)


def losses(lines: Lines) -> list[float]:
    return [line["loss"] for line in lines]


def norms(lines: Lines) -> list[float]:
    return [line["grad_norm"] for line in lines]


@pytest.fixture(scope="module")
def on_three(backbones: dict[str, str], folder: Path) -> dict[str, Lines]:
    return run_ranks(3, backbones, {f"mixed-{stage}": zero(stage, mixed=True) for stage in ZERO_STAGES}, folder)


@pytest.mark.parametrize("run", [*(f"long-{stage}" for stage in STAGES), *(f"long-{name}" for name in OFFLOADS)])
def test_two_ranks_at_every_zero_stage_and_offload_follow_the_losses_of_one_rank(
    run: str, on_one: dict[str, Lines], on_two: dict[str, Lines]
) -> None:
    alone = on_one["long-0"]
    assert len(on_two[run]) == len(alone) == 24
    assert losses(on_two[run]) == pytest.approx(losses(alone), rel=1e-4)
    if run != "long-0":  # DeepSpeed tells no norm at stage 0 in fp32
        assert norms(on_two[run]) == pytest.approx(norms(on_one["long-1"]), rel=1e-3)


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_the_gradient_that_two_ranks_apply_is_that_of_each_sample_by_itself(
    stage: int,
    folder: Path,
    on_two: dict[str, Lines],
    on_one: dict[str, Lines],
    toy_model: Model,
    vision: VisionSpec,
    prepared_blocks: Blocks,
    blocks_layout: PackCollator,
) -> None:
    plain = PackLoss(build_llava(toy_model, vision, seed=0, dtype=torch.float32)).eval()
    first = next(BatchPlan(len(prepared_blocks), 8, epochs=1, seed=0).from_step(0)).samples
    _, summed = gradients(plain, packs_of(prepared_blocks, blocks_layout, [[int(number)] for number in first]))
    loss_tokens = int(prepared_blocks.lengths.loss_tokens[first].sum())
    for file in (f"two-{stage}.safetensors", "one.safetensors"):
        applied = load_file(folder / file)
        assert set(applied) == {name.removeprefix("llava.") for name in summed}
        for name, gradient in summed.items():
            expected = 0.1 * gradient / loss_tokens
            found = applied[name.removeprefix("llava.")]
            atol = 1e-5 * float(expected.abs().max())  # sums that cancel keep the rounding of their terms
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol, msg=name)


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_ranks_with_text_alone_images_alone_and_both_stay_in_step(
    stage: int, on_one: dict[str, Lines], on_three: dict[str, Lines]
) -> None:
    mixed = on_three[f"mixed-{stage}"]
    assert len(mixed) == 4
    assert losses(mixed) == pytest.approx(losses(on_one["mixed-1"]), rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_engine_continues_with_the_same_losses_to_the_bit(
    stage: int, on_two: dict[str, Lines], again_on_two: dict[str, Lines]
) -> None:
    whole, resumed = on_two[f"plain-{stage}"], again_on_two[f"resumed-{stage}"]
    assert losses(resumed) == losses(whole)[3:]
    assert whole[-1]["weights"] == resumed[-1]["weights"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("run", ["from-two", "from-one"])
def test_an_engine_resumed_on_another_number_of_ranks_goes_on_with_its_optimizer_state(
    stage: int, run: str, on_one: dict[str, Lines], again_on_two: dict[str, Lines]
) -> None:
    """With Adam's moments or its step counter reset, losses would differ by a per cent."""
    resumed = (on_one if run == "from-two" else again_on_two)[f"{run}-{stage}"]
    assert losses(resumed) == pytest.approx(losses(on_one[f"plain-{stage}"])[3:], rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_is_skipped_by_all_ranks_and_training_goes_on(
    stage: int, on_two: dict[str, Lines]
) -> None:
    lines = on_two[f"poisoned-{stage}"]
    assert [line["skipped"] for line in lines] == [False, False, True, False, False, False]
    assert math.isnan(lines[2]["loss"])
    assert all(math.isfinite(line["loss"]) for line in lines[3:])
    assert lines[5]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_rehearsal_changes_nothing(stage: int, on_one: dict[str, Lines]) -> None:
    plain, rehearsed = on_one[f"plain-{stage}"], on_one[f"rehearsed-{stage}"]
    assert losses(plain) == losses(rehearsed)
    assert plain[-1]["weights"] == rehearsed[-1]["weights"]


@pytest.mark.parametrize("run", ["recomputed", "auto", "compiled"])
def test_recomputed_activations_and_compiled_code_follow_the_same_losses(run: str, on_one: dict[str, Lines]) -> None:
    assert losses(on_one[run]) == pytest.approx(losses(on_one["plain-1"]), rel=1e-4)


def test_settings_left_open_are_the_fastest_that_fit(on_one: dict[str, Lines]) -> None:
    """One rank with memory to spare has nothing to shard and nothing to compute twice."""
    way = on_one["auto"][0]["way"]
    assert (way["zero_stage"], way["recompute"], way["offload_optimizer"]) == (0, False, False)


def test_what_is_advised_should_memory_not_do_names_every_setting_that_makes_it(on_one: dict[str, Lines]) -> None:
    told = on_one["plain-0"][0]["advice"]
    for setting in ("stage", "offload_optimizer", "offload_parameters"):
        assert f"finetune.zero.{setting}=" in told
    assert "finetune.activation_checkpointing=" in told
    assert "finetune.max_tokens_per_pack=" in told


def test_a_run_that_chose_its_zero_stage_goes_on_with_it(again_on_two: dict[str, Lines]) -> None:
    """Only this stage can read the checkpoint, whatever would be chosen now."""
    found = again_on_two["left-open"]
    assert found[0]["way"]["zero_stage"] == 2
    assert losses(found) == losses(again_on_two["resumed-2"])


def test_memory_that_does_not_suffice_is_told_before_the_first_step_with_what_to_change(
    backbones: dict[str, str], folder: Path
) -> None:
    (line,) = run_ranks(1, backbones, {"starved": zero(1, starve=True)}, folder)["starved"]
    assert line["told"].startswith("out of memory in the memory dry run of the largest packs (up to ")
    assert "images): use less (" in line["told"]


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_follows_the_losses_of_fp32_within_its_rounding(stage: int, on_two: dict[str, Lines]) -> None:
    assert losses(on_two[f"bf16-{stage}"]) == pytest.approx(losses(on_two["plain-1"]), rel=0.02)


def test_a_connector_checkpoint_holds_the_connector_and_its_moments_only(
    toy_model: Model, vision: VisionSpec, folder: Path, on_two: dict[str, Lines]
) -> None:
    connector = build_llava(toy_model, vision, seed=0, dtype=torch.float32).model.multi_modal_projector
    values = sum(weight.numel() for weight in connector.parameters())
    found = [_values(torch.load(file, weights_only=False)) for file in (folder / "connector").rglob("*.pt")]
    # The weights, ZeRO's own copy of them and Adam's two moments, with a little padding and counters.
    assert 4 * values <= sum(found) < 4 * values + 200


def test_the_connector_and_the_vision_tower_may_have_rates_of_their_own(model: PackLoss) -> None:
    training = Training(lr=2e-5, connector_lr=1e-4, vision_lr=2e-6, weight_decay=0.1)
    set_trainable(model.llava, "finetune", vision=True)
    groups = list(parameter_groups(model, training))
    assert {group["peak_lr"] for group in groups} == {2e-5, 1e-4, 2e-6}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert {weight.ndim >= 2 for weight in group["params"]} == {group["weight_decay"] > 0}


def test_settings_without_a_name_here_are_handed_to_deepspeed_and_ours_stay() -> None:
    training = Training(deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True})
    config = deepspeed_config(training, trained=10**6)
    assert config["wall_clock_breakdown"] is True
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(("trained", "bucket"), [(100, 100), (10**10, 500_000_000)])
def test_a_bucket_is_no_larger_than_what_it_holds(trained: int, bucket: int) -> None:
    assert deepspeed_config(Training(), trained)["zero_optimization"]["reduce_bucket_size"] == bucket


def _values(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return state.numel()
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return sum(_values(value) for value in inner)
