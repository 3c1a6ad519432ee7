"""Packs become one row of several samples with restarting positions, loaded ahead in the plan's order."""

import io
import threading

import pytest
import torch
from PIL import Image

from raylava.config.recipe import Vision
from raylava.corpus.blocks import Blocks, Sample
from raylava.models.families import clip
from raylava.models.packs import HostPack
from raylava.models.registry import PixelRule, vision_spec
from raylava.train.batch_plan import BatchPlan
from raylava.train.data_loader import PackCollator, PackedDataLoader, StepBatch
from tests.support.packs import on_cpu

IMAGE, BOS = 99, 2
CONFIG = clip.FAMILY.complete({"hidden_size": 8, "image_size": 16, "patch_size": 8})
VISION = vision_spec(Vision(name="tiny"), clip.FAMILY, CONFIG, PixelRule(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
COLLATOR = PackCollator(VISION, IMAGE, BOS)


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


WITH_IMAGE = Sample("a", [BOS, IMAGE, 7, 8, 9], [(3, 5)], [png(255)], length=8)
TEXT = Sample("b", [BOS, 5, 6], [(1, 2)], [], length=3)


def test_image_tokens_are_expanded_and_target_positions_shifted() -> None:
    pack = COLLATOR.collate([WITH_IMAGE])
    assert pack.input_ids.tolist() == [[BOS, IMAGE, IMAGE, IMAGE, IMAGE, 7, 8, 9]]
    assert pack.position_ids.tolist() == [list(range(8))]
    assert pack.target_positions.tolist() == [5, 6]
    assert pack.labels.tolist() == [8, 9]
    assert torch.equal(on_cpu(pack).pixel_values, torch.ones(1, 3, 16, 16))


def test_positions_restart_with_each_sample_of_a_pack() -> None:
    pack = COLLATOR.collate([TEXT, WITH_IMAGE])
    assert pack.position_ids.tolist() == [[0, 1, 2, *range(8)]]
    assert pack.target_positions.tolist() == [0, 8, 9]
    assert pack.labels.tolist() == [5, 8, 9]


@pytest.mark.parametrize("samples", [[TEXT, TEXT], []])
def test_pack_without_images_gets_a_blank_image_without_loss_tokens(samples: list[Sample]) -> None:
    pack = COLLATOR.collate(samples)
    assert on_cpu(pack).pixel_values.shape == (1, 3, 16, 16)
    assert int((pack.input_ids == IMAGE).sum()) == VISION.image_tokens
    assert len(pack.labels) == len(samples)
    assert pack.position_ids[0, 3 * len(samples)] == 0


def test_any_number_of_threads_gives_the_same_batches_in_order(
    prepared_blocks: Blocks, pack_collator: PackCollator
) -> None:
    plan = BatchPlan(len(prepared_blocks), 8, epochs=2, seed=1)
    names: set[str] = set()

    def prepare(pack: HostPack) -> HostPack:
        names.add(threading.current_thread().name)
        return pack

    def batches(threads: int) -> list[StepBatch]:
        arguments = (prepared_blocks, plan, pack_collator, 0, 1, 384)
        return list(PackedDataLoader(*arguments, prepare=prepare, threads=threads))

    one, several = batches(1), batches(4)
    assert len(names) > 2, "one of the first run, several of the second"
    assert [batch.step.number for batch in several] == list(range(plan.steps))
    for expected, batch in zip(one, several, strict=True):
        for left, right in zip(expected.packs, batch.packs, strict=True):
            assert torch.equal(left.input_ids, right.input_ids)
            assert torch.equal(left.pixels, right.pixels)


def test_batches_follow_the_plan_from_any_first_step(prepared_blocks: Blocks, pack_collator: PackCollator) -> None:
    plan = BatchPlan(len(prepared_blocks), 8, epochs=2, seed=1)
    for first in (0, 7):
        loader = PackedDataLoader(
            prepared_blocks, plan, pack_collator, rank=0, world_size=1, max_tokens_per_pack=512, first_step=first
        )
        batches = list(loader)
        assert [batch.step.number for batch in batches] == list(range(first, plan.steps))
        for batch in batches:
            assert sum(len(pack.labels) for pack in batch.packs) == batch.loss_tokens


def test_ranks_divide_the_samples_of_a_step(prepared_blocks: Blocks, pack_collator: PackCollator) -> None:
    plan = BatchPlan(len(prepared_blocks), 8, epochs=1, seed=1)
    ranks = [
        list(PackedDataLoader(prepared_blocks, plan, pack_collator, rank, 2, max_tokens_per_pack=256))
        for rank in range(2)
    ]
    for first, second in zip(*ranks, strict=True):
        assert len(first.packs) == len(second.packs)
        assert first.loss_tokens == second.loss_tokens
        assert sum(len(pack.labels) for pack in first.packs + second.packs) == first.loss_tokens


def test_read_error_in_the_background_thread_reaches_the_consumer(
    prepared_blocks: Blocks, pack_collator: PackCollator
) -> None:
    plan = BatchPlan(len(prepared_blocks) + 1, 8, epochs=1, seed=1)  # one sample too many
    with pytest.raises(IndexError):
        list(PackedDataLoader(prepared_blocks, plan, pack_collator, 0, 1, max_tokens_per_pack=256))


def test_closing_the_iterator_early_ends_the_background_thread(
    prepared_blocks: Blocks, pack_collator: PackCollator
) -> None:
    plan = BatchPlan(len(prepared_blocks), 2, epochs=9, seed=1)
    batches = iter(PackedDataLoader(prepared_blocks, plan, pack_collator, 0, 1, max_tokens_per_pack=256))
    next(batches)
    assert [thread for thread in threading.enumerate() if thread.name == "data-loader"]
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "data-loader"]


def test_sample_whose_length_differs_from_the_block_is_rejected() -> None:
    with pytest.raises(AssertionError, match="the block has 2"):
        COLLATOR.collate([Sample("a", [BOS, IMAGE], [(1, 2)], [png(0)], length=2)])
