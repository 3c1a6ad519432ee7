"""A step's loss is the sum over supervised tokens divided by their number, however samples are packed or sharded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raylava.corpus.blocks import Blocks
from raylava.model.backbones import VisionSpec
from raylava.model.llava import (
    CONNECTOR,
    VISION_TOWER,
    PackLoss,
    PackTensors,
    assemble,
    choose_trainable,
    trainable_names,
)
from raylava.recipe import Model, Training
from raylava.train.engine import learning_rate
from raylava.train.feed import Layout


@pytest.fixture(scope="module")
def model(micro_model: Model, vision: VisionSpec) -> PackLoss:
    return PackLoss(assemble(micro_model, vision, seed=0, dtype=torch.float32)).eval()


def packs_of(blocks: Blocks, layout: Layout, groups: list[list[int]]) -> list[PackTensors]:
    return [layout.tensors([blocks[number] for number in group]) for group in groups]


def gradients(model: PackLoss, packs: list[PackTensors]) -> tuple[float, dict[str, torch.Tensor]]:
    choose_trainable(model.llava, "finetune")
    model.zero_grad()
    total = torch.zeros(())
    for pack in packs:
        loss = model(**vars(pack))
        loss.backward()
        total += loss.detach()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return float(total), found


def test_packed_logits_equal_those_of_each_sample_alone(
    model: PackLoss, prepared_blocks: Blocks, blocks_layout: Layout
) -> None:
    numbers = [0, 1, 2, 3]
    with torch.inference_mode():
        (packed,) = packs_of(prepared_blocks, blocks_layout, [numbers])
        together = model.logits(packed.input_ids, packed.position_ids, packed.pixel_values, packed.keep)
        alone = [
            model.logits(pack.input_ids, pack.position_ids, pack.pixel_values, pack.keep)
            for pack in packs_of(prepared_blocks, blocks_layout, [[number] for number in numbers])
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_the_whole_rows_logits(
    model: PackLoss, prepared_blocks: Blocks, blocks_layout: Layout
) -> None:
    """Computing logits at supervised positions only changes nothing: compare with transformers' own forward and
    labels.
    """
    (pack,) = packs_of(prepared_blocks, blocks_layout, [[5]])
    labels = torch.full_like(pack.input_ids, -100)
    labels[0, pack.keep + 1] = pack.labels
    with torch.inference_mode():
        ours = model(**vars(pack)) / len(pack.labels)
        theirs = model.llava(input_ids=pack.input_ids, pixel_values=pack.pixel_values, labels=labels).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_do_not_depend_on_packing(model: PackLoss, prepared_blocks: Blocks, blocks_layout: Layout) -> None:
    one_a_row = [[number] for number in range(6)]
    loss, expected = gradients(model, packs_of(prepared_blocks, blocks_layout, one_a_row))
    for groups in ([[0, 1, 2, 3, 4, 5]], [[5, 0], [3, 2, 4], [1]], [*one_a_row, []]):
        packed_loss, found = gradients(model, packs_of(prepared_blocks, blocks_layout, groups))
        assert packed_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-5, msg=name)


def test_pretraining_trains_the_connector_and_finetuning_also_the_language_model(model: PackLoss) -> None:
    choose_trainable(model.llava, "pretrain")
    assert {name.startswith(CONNECTOR) for name in trainable_names(model.llava)} == {True}
    assert len(trainable_names(model.llava)) == 4
    choose_trainable(model.llava, "finetune")
    frozen = {name for name, _ in model.llava.named_parameters()} - trainable_names(model.llava)
    assert frozen == {name for name, _ in model.llava.named_parameters() if name.startswith(VISION_TOWER)}


def test_a_connector_is_drawn_from_its_seed_alone(micro_model: Model, vision: VisionSpec) -> None:
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(len(os.urandom(1)) + seed * 31)  # the global state must not matter
        return assemble(micro_model, vision, seed, torch.float32).model.multi_modal_projector.linear_1.weight

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


SCHEDULE = Training(lr=1.0, warmup=0.1, schedule="cosine")


def test_the_rate_warms_up_and_then_falls_as_a_cosine_to_zero() -> None:
    rates = [learning_rate(step, 100, SCHEDULE) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[99] < 1e-3


@pytest.mark.parametrize(("schedule", "middle", "end"), [("linear", 0.5, 1 / 90), ("constant", 1.0, 1.0)])
def test_other_schedules(schedule: str, middle: float, end: float) -> None:
    training = SCHEDULE.model_copy(update={"schedule": schedule})
    assert learning_rate(55, 100, training) == pytest.approx(middle)
    assert learning_rate(99, 100, training) == pytest.approx(end)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(0, 10, SCHEDULE.model_copy(update={"warmup": 0.0})) == 1.0


# ZeRO, for real: processes of their own under torch.distributed, without Ray.


def run_ranks(world_size: int, arguments: list[str], folder: Path) -> list[dict]:
    script = Path(__file__).parent / "rank.py"
    rendezvous = folder / f"rendezvous-{os.urandom(4).hex()}"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world_size), str(rendezvous), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    for rank, (_, error) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, error[-3000:]
    return [json.loads(line) for line in outputs[0][0].splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def arguments(micro_model: Model, prepared_blocks: Blocks) -> list[str]:
    return [micro_model.language.name, micro_model.vision.name, str(prepared_blocks.folder)]


@pytest.fixture(scope="module")
def alone(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_ranks(1, [*arguments, "1", "-"], tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_at_every_zero_stage_follow_the_losses_of_one_rank(
    zero_stage: int, arguments: list[str], alone: list[dict], tmp_path: Path
) -> None:
    together = run_ranks(2, [*arguments, str(zero_stage), "-"], tmp_path)
    assert len(together) == len(alone) == 6
    for one, other in zip(alone, together, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        if zero_stage > 0:  # DeepSpeed tells no norm at stage 0 in fp32
            assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_resumed_engine_continues_with_the_same_losses_to_the_bit(
    zero_stage: int, arguments: list[str], tmp_path: Path
) -> None:
    checkpoint = str(tmp_path / "checkpoint")
    whole = run_ranks(2, [*arguments, str(zero_stage), checkpoint], tmp_path)
    resumed = run_ranks(2, [*arguments, str(zero_stage), checkpoint, "resume"], tmp_path)
    assert [step["loss"] for step in resumed] == [step["loss"] for step in whole[3:]]
    assert whole[-1]["weights"] == resumed[-1]["weights"]
