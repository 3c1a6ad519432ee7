"""The samples of a step depend on seed, epoch and batch size only; packing decides which rank computes them."""

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylava.corpus.blocks import Lengths
from raylava.corpus.shuffle import ShuffleWindows
from raylava.errors import UserError
from raylava.train.batch_plan import (
    BatchPlan,
    Pack,
    pack_batch,
    sample_cost,
    worst_case_packs,
)

MAX_TOKENS_PER_PACK = 2048
WORLD_SIZES = (1, 2, 3, 4, 8, 64)


def llava_mix(count: int, seed: int = 0) -> np.ndarray:
    """Return lengths like those of LLaVA's instruction mix with 576 image tokens.

    Most samples have an image, some are text only, and the distribution has a long tail.
    """
    rng = np.random.default_rng(seed)
    with_image = 576 + np.clip(rng.lognormal(5.0, 0.7, count), 20, 1400).astype(int)
    text_only = np.clip(rng.lognormal(6.0, 0.8, count), 20, 2048).astype(int)
    return np.where(rng.random(count) < 0.94, with_image, text_only).astype(np.int32)


def epoch_orders(plan: BatchPlan) -> list[list[int]]:
    """Return the samples of each epoch in plan order."""
    orders: list[list[int]] = [[] for _ in range(plan.epochs)]
    for step in plan.from_step(0):
        orders[step.epoch] += step.samples.tolist()
    return orders


LENGTHS = {
    "all equal": np.full(640, 700, dtype=np.int32),
    "llava mix": llava_mix(640),
    "one giant": np.array([2048, *[30] * 639], dtype=np.int32),
    "many tiny": np.full(640, 8, dtype=np.int32),
    "text only": np.random.default_rng(1).integers(5, 400, 640).astype(np.int32),
    "several images per sample": (576 * np.random.default_rng(2).integers(1, 4, 640) + 90).astype(np.int32),
}


def packed_samples(ranks: list[list[Pack]]) -> list[int]:
    return [sample for packs in ranks for pack in packs for sample in pack]


def check_step(samples: Sequence[int], lengths: np.ndarray, ranks: list[list[Pack]], world_size: int) -> None:
    assert sorted(packed_samples(ranks)) == sorted(samples), "each sample exactly once"
    assert len(ranks) == world_size
    assert len({len(packs) for packs in ranks}) == 1, "every rank runs the same number of packs"
    assert all(lengths[list(pack)].sum() <= MAX_TOKENS_PER_PACK for packs in ranks for pack in packs)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("global_batch_size", [1, 16, 128])
@pytest.mark.parametrize("distribution", LENGTHS)
def test_epoch_contains_every_sample_once_with_equal_pack_counts_on_all_ranks(
    distribution: str, global_batch_size: int, world_size: int
) -> None:
    lengths = LENGTHS[distribution]
    plan = BatchPlan(len(lengths), global_batch_size, epochs=1, seed=3)
    samples: list[int] = []
    for step in plan.from_step(0):
        ranks = pack_batch(step.samples, lengths, world_size, MAX_TOKENS_PER_PACK)
        check_step(list(step.samples), lengths, ranks, world_size)
        samples += packed_samples(ranks)
    assert sorted(samples) == list(range(len(lengths)))


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, MAX_TOKENS_PER_PACK), min_size=1, max_size=60),
    st.sampled_from(WORLD_SIZES),
)
def test_any_lengths_are_packed_within_the_token_limit(lengths: list[int], world_size: int) -> None:
    array = np.array(lengths, dtype=np.int32)
    samples = range(len(lengths))
    check_step(samples, array, pack_batch(samples, array, world_size, MAX_TOKENS_PER_PACK), world_size)


def test_ranks_of_a_llava_like_step_are_balanced_to_five_percent() -> None:
    worst_imbalance = 0.0
    for seed in range(20):
        lengths = llava_mix(128, seed)
        ranks = pack_batch(range(128), lengths, 8, MAX_TOKENS_PER_PACK)
        loads = [sum(sample_cost(int(lengths[sample])) for pack in packs for sample in pack) for packs in ranks]
        worst_imbalance = max(worst_imbalance, max(loads) / (sum(loads) / len(loads)))
    assert worst_imbalance <= 1.05


def test_plan_from_any_step_equals_the_uninterrupted_plan() -> None:
    plan = BatchPlan(103, 10, epochs=3, seed=5)
    uninterrupted = list(plan.from_step(0))
    assert len(uninterrupted) == plan.steps == 33
    for first in (0, 1, 10, 11, 12, 25, 32):
        resumed = list(plan.from_step(first))
        assert [step.number for step in resumed] == list(range(first, 33))
        pairs = zip(resumed, uninterrupted[first:], strict=True)
        assert all(np.array_equal(step.samples, expected.samples) for step, expected in pairs)


def test_each_epoch_has_a_different_order_and_a_short_last_step() -> None:
    steps = list(BatchPlan(103, 10, epochs=2, seed=5).from_step(0))
    assert len(steps[10].samples) == len(steps[21].samples) == 3
    orders = [np.concatenate([step.samples for step in steps if step.epoch == epoch]) for epoch in (0, 1)]
    assert not np.array_equal(*orders)
    assert np.array_equal(np.sort(orders[0]), np.sort(orders[1]))


def test_batch_sizes_of_the_paper_give_the_step_counts_of_the_paper() -> None:
    assert BatchPlan(558_128, 256, epochs=1, seed=0).steps == 2_181
    assert BatchPlan(665_298, 128, epochs=1, seed=0).steps == 5_198


def test_max_steps_limits_the_plan() -> None:
    assert [step.number for step in BatchPlan(100, 10, epochs=2, seed=0, max_steps=3).from_step(1)] == [1, 2]


def test_permutation_is_determined_by_seed_and_epoch() -> None:
    assert epoch_orders(BatchPlan(5, 2, 1, 0)) == epoch_orders(BatchPlan(5, 2, 1, 0))
    orders = {tuple(order) for seed in range(3) for order in epoch_orders(BatchPlan(50, 7, epochs=3, seed=seed))}
    assert len(orders) == 9


def test_sample_longer_than_a_pack_is_rejected_with_the_remedy() -> None:
    with pytest.raises(UserError, match="raise max_tokens_per_pack"):
        pack_batch([0], np.array([3000], dtype=np.int32), 1, MAX_TOKENS_PER_PACK)


WINDOWS = ShuffleWindows(rows=(7, 3, 9, 1, 5, 5, 8, 2), bytes=(70, 30, 90, 10, 50, 50, 80, 20), window_bytes=120)


def test_windowed_epoch_visits_every_sample_once_and_keeps_open_blocks_within_the_window() -> None:
    first = np.concatenate([[0], np.cumsum(WINDOWS.rows)])
    for order in epoch_orders(BatchPlan(40, 8, epochs=5, seed=1, windows=WINDOWS)):
        assert sorted(order) == list(range(40))
        blocks = np.searchsorted(first, order, side="right") - 1
        spans = [(np.flatnonzero(blocks == block).min(), np.flatnonzero(blocks == block).max()) for block in range(8)]
        for position in range(40):
            open_blocks = [block for block, (low, high) in enumerate(spans) if low <= position <= high]
            assert sum(WINDOWS.bytes[block] for block in open_blocks) <= WINDOWS.window_bytes


def test_windowed_epochs_differ_and_a_corpus_within_one_window_is_shuffled_as_a_whole() -> None:
    orders = {tuple(order) for order in epoch_orders(BatchPlan(40, 8, epochs=5, seed=1, windows=WINDOWS))}
    assert len(orders) == 5
    one_window = ShuffleWindows(WINDOWS.rows, WINDOWS.bytes, window_bytes=400)
    windowed, unwindowed = (
        np.concatenate([step.samples for step in BatchPlan(40, 8, 1, 0, windows=windows).from_step(0)])
        for windows in (one_window, None)
    )
    assert np.array_equal(windowed, unwindowed)


def test_planning_an_epoch_of_the_llava_mix_takes_under_500_mb() -> None:
    """665,298 samples (issue 4). It takes seconds, which jobs/bench measures."""
    lengths = llava_mix(665_298)
    tracemalloc.start()
    steps = sum(1 for _ in BatchPlan(665_298, 128, epochs=1, seed=0).from_step(0))
    pack_batch(range(128), lengths, 8, MAX_TOKENS_PER_PACK)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert steps == 5_198
    assert peak < 500e6


def test_no_pack_of_any_step_exceeds_the_worst_case_packs() -> None:
    lengths = llava_mix(640)
    images = (lengths > 576).astype(np.int32)
    loss_tokens = np.maximum(1, lengths // 3 - 200 * images)
    worst_case = worst_case_packs(Lengths(lengths, images, loss_tokens), MAX_TOKENS_PER_PACK, samples=64)
    max_images, max_loss_tokens = (
        max(counts[list(pack)].sum() for pack in worst_case) for counts in (images, loss_tokens)
    )
    for step in BatchPlan(640, 64, epochs=1, seed=0).from_step(0):
        for packs in pack_batch(step.samples, lengths, 4, MAX_TOKENS_PER_PACK):
            for pack in packs:
                assert images[list(pack)].sum() <= max_images
                assert loss_tokens[list(pack)].sum() <= max_loss_tokens
                assert lengths[list(pack)].sum() <= max(lengths[list(worst_case[0])].sum(), MAX_TOKENS_PER_PACK)
