"""Packs become one row of several samples, positions restarting with each, in the plan's order, ahead of need."""

import io

import pytest
import torch
from PIL import Image

from raylava.corpus.blocks import Blocks, Sample
from raylava.models.registry import PixelRule, VisionSpec
from raylava.train.batch_plan import BatchPlan
from raylava.train.data_loader import PackCollator, PackedDataLoader

IMAGE, BOS = 99, 2
VISION = VisionSpec("tiny", "clip", PixelRule(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), patch_size=8, width=8)
LAYOUT = PackCollator(VISION, IMAGE, BOS)


def image(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


WITH_IMAGE = Sample("a", [BOS, IMAGE, 7, 8, 9], [(3, 5)], [image(255)], length=8)
TEXT = Sample("b", [BOS, 5, 6], [(1, 2)], [], length=3)


def test_image_tokens_are_expanded_and_targets_move_with_them() -> None:
    pack = LAYOUT.tensors([WITH_IMAGE])
    assert pack.input_ids.tolist() == [[BOS, IMAGE, IMAGE, IMAGE, IMAGE, 7, 8, 9]]
    assert pack.position_ids.tolist() == [list(range(8))]
    assert pack.target_positions.tolist() == [5, 6]
    assert pack.labels.tolist() == [8, 9]
    assert torch.equal(pack.pixel_values, torch.ones(1, 3, 16, 16))


def test_positions_restart_with_each_sample_of_a_pack() -> None:
    pack = LAYOUT.tensors([TEXT, WITH_IMAGE])
    assert pack.position_ids.tolist() == [[0, 1, 2, *range(8)]]
    assert pack.target_positions.tolist() == [0, 8, 9]
    assert pack.labels.tolist() == [5, 8, 9]


@pytest.mark.parametrize("samples", [[TEXT, TEXT], []])
def test_a_pack_without_images_carries_a_blank_one_that_nothing_supervises(samples: list[Sample]) -> None:
    pack = LAYOUT.tensors(samples)
    assert pack.pixel_values.shape == (1, 3, 16, 16)
    assert int((pack.input_ids == IMAGE).sum()) == VISION.image_tokens
    assert len(pack.labels) == len(samples)
    assert pack.position_ids[0, 3 * len(samples)] == 0


def test_work_comes_in_the_plans_order_from_any_step(prepared_blocks: Blocks, blocks_layout: PackCollator) -> None:
    plan = BatchPlan(len(prepared_blocks), 8, epochs=2, seed=1)
    for first in (0, 7):
        feed = PackedDataLoader(
            prepared_blocks, plan, blocks_layout, rank=0, world_size=1, max_tokens_per_pack=512, first=first
        )
        work = list(feed)
        assert [item.step.number for item in work] == list(range(first, plan.steps))
        for item in work:
            assert sum(len(pack.labels) for pack in item.packs) == item.loss_tokens


def test_ranks_share_a_steps_samples_between_them(prepared_blocks: Blocks, blocks_layout: PackCollator) -> None:
    plan = BatchPlan(len(prepared_blocks), 8, epochs=1, seed=1)
    ranks = [
        list(PackedDataLoader(prepared_blocks, plan, blocks_layout, rank, 2, max_tokens_per_pack=256))
        for rank in range(2)
    ]
    for one, other in zip(*ranks, strict=True):
        assert len(one.packs) == len(other.packs)
        assert one.loss_spans == other.loss_spans
        assert sum(len(pack.labels) for pack in one.packs + other.packs) == one.loss_spans


def test_an_error_while_reading_reaches_the_trainer(prepared_blocks: Blocks, blocks_layout: PackCollator) -> None:
    plan = BatchPlan(len(prepared_blocks) + 1, 8, epochs=1, seed=1)  # one sample too many
    with pytest.raises(IndexError):
        list(PackedDataLoader(prepared_blocks, plan, blocks_layout, 0, 1, max_tokens_per_pack=256))


def test_leaving_the_feed_early_ends_its_thread(prepared_blocks: Blocks, blocks_layout: PackCollator) -> None:
    import threading

    plan = BatchPlan(len(prepared_blocks), 2, epochs=9, seed=1)
    feed = iter(PackedDataLoader(prepared_blocks, plan, blocks_layout, 0, 1, max_tokens_per_pack=256))
    next(feed)
    feed.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "feed"]


def test_a_block_that_lies_about_a_length_is_refused() -> None:
    with pytest.raises(AssertionError, match="the block says"):
        LAYOUT.tensors([Sample("a", [BOS, IMAGE], [(1, 2)], [image(0)], length=2)])
