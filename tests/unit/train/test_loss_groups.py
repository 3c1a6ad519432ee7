"""Steps by modality, and the weights of their loss tokens, follow LLaVA's sampler and depend on the plan alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylava.config.recipe import Training
from raylava.corpus.blocks import Lengths
from raylava.corpus.shuffle import ShuffleWindows
from raylava.train.batch_plan import BatchPlan, plan_batches
from tests.reference.trainer import modality_batches


def random_lengths(count: int, seed: int = 0, with_image: float = 0.7) -> Lengths:
    rng = np.random.default_rng(seed)
    length = rng.integers(20, 2000, count).astype(np.int32)
    images = (rng.random(count) < with_image).astype(np.int32)
    return Lengths(length, images, rng.integers(1, 20, count).astype(np.int32))


def training(**settings: object) -> Training:
    return Training.model_validate({"global_batch_size": 16, "epochs": 2, **settings})


BY_MODALITY = {"batching": "by_modality", "loss_weighting": "groups", "loss_group_size": 2}


def sample_weights(plan: BatchPlan, lengths: Lengths) -> list[dict[int, float]]:
    """Return the weight of each sample's loss tokens, by step."""
    return [
        dict(zip(step.samples.tolist(), plan.loss_weights(step, lengths.loss_tokens), strict=True))
        for step in plan.from_step(0)
    ]


@pytest.mark.parametrize("count", [203, 208, 40, 17])
def test_steps_by_modality_are_those_of_llavas_sampler(count: int) -> None:
    """Only the random numbers are ours: the epoch's permutation, then that of its full batches."""
    lengths = random_lengths(count)
    plan = plan_batches(training(**BY_MODALITY), 5, lengths)
    steps = list(plan.from_step(0))
    for epoch in (0, 1):
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([5, epoch])))
        order = rng.permutation(count).tolist()
        with_image = [sample for sample in order if lengths.images[sample]]
        without = [sample for sample in order if not lengths.images[sample]]
        expected = modality_batches(with_image, without, lengths.length.tolist(), 16, 2, rng.permutation)
        actual = [step.samples.tolist() for step in steps if step.epoch == epoch]
        groups = [[step[start : start + 2] for start in range(0, len(step), 2)] for step in actual]
        assert groups == expected


@given(count=st.integers(1, 120), with_image=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), seed=st.integers(0, 3))
def test_every_epoch_has_each_sample_once_in_the_same_number_of_steps(count: int, with_image: float, seed: int) -> None:
    lengths = random_lengths(count, seed, with_image)
    plan = plan_batches(training(**BY_MODALITY), seed, lengths)
    steps = list(plan.from_step(0))
    assert len(steps) == plan.steps
    for epoch in (0, 1):
        samples = [sample for step in steps if step.epoch == epoch for sample in step.samples.tolist()]
        assert sorted(samples) == list(range(count))


def test_a_corpus_of_one_modality_is_ordered_as_without_grouping() -> None:
    lengths = random_lengths(50, with_image=1.0)
    by_modality = plan_batches(training(batching="by_modality"), 1, lengths)
    mixed = plan_batches(training(), 1, lengths)
    for one, other in zip(by_modality.from_step(0), mixed.from_step(0), strict=True):
        assert one.samples.tolist() == other.samples.tolist()


def test_steps_by_modality_keep_the_order_of_shuffle_windows() -> None:
    lengths = random_lengths(160)
    windows = ShuffleWindows(rows=(20,) * 8, bytes=(10,) * 8, window_bytes=20)
    plan = plan_batches(training(batching="by_modality", epochs=1), 1, lengths, windows)
    full = [step for step in plan.from_step(0) if len({*lengths.images[step.samples].tolist()}) == 1]
    assert len(full) >= 6
    for step in full:
        assert len({int(sample) // 20 for sample in step.samples}) <= 6, "two windows of two blocks, and a remainder"


def test_groups_of_a_mixed_batch_have_similar_lengths_or_are_consecutive() -> None:
    lengths = random_lengths(64)
    settings = {"loss_weighting": "groups", "loss_group_size": 4, "epochs": 1}
    drawn = plan_batches(training(**settings, loss_grouping="as_drawn"), 1, lengths)
    similar = plan_batches(training(**settings), 1, lengths)
    plain = plan_batches(training(epochs=1), 1, lengths)
    for one, other, step in zip(drawn.from_step(0), similar.from_step(0), plain.from_step(0), strict=True):
        assert one.samples.tolist() == step.samples.tolist()
        assert sorted(other.samples.tolist()) == sorted(step.samples.tolist())
        totals = [
            plan.reshape(4, 4).sum(axis=1) for plan in (lengths.length[other.samples], lengths.length[one.samples])
        ]
        assert np.ptp(totals[0]) < np.ptp(totals[1])


@pytest.mark.parametrize(
    "settings",
    [{}, {"loss_weighting": "samples"}, {"loss_weighting": "groups", "loss_group_size": 4}, BY_MODALITY],
    ids=["tokens", "samples", "groups", "by modality"],
)
def test_weights_of_all_loss_tokens_of_a_step_sum_up_to_one(settings: dict[str, object]) -> None:
    lengths = random_lengths(101)
    for weights in sample_weights(plan_batches(training(**settings), 1, lengths), lengths):
        total = sum(weight * int(lengths.loss_tokens[sample]) for sample, weight in weights.items())
        assert total == pytest.approx(1.0, rel=1e-12)


def test_each_weighting_gives_tokens_samples_or_groups_equal_shares() -> None:
    lengths = random_lengths(16)
    tokens = lengths.loss_tokens
    (by_token,) = sample_weights(plan_batches(training(epochs=1), 1, lengths), lengths)
    assert set(by_token.values()) == {1.0 / int(tokens.sum())}
    (by_sample,) = sample_weights(plan_batches(training(epochs=1, loss_weighting="samples"), 1, lengths), lengths)
    assert by_sample == {sample: pytest.approx(1 / (16 * int(tokens[sample]))) for sample in range(16)}
    plan = plan_batches(training(epochs=1, loss_weighting="groups", loss_group_size=4), 1, lengths)
    (by_group,) = sample_weights(plan, lengths)
    (step,) = plan.from_step(0)
    for group in step.samples.reshape(4, 4).tolist():
        expected = 1 / (4 * int(tokens[group].sum()))
        assert [by_group[sample] for sample in group] == pytest.approx([expected] * 4)


def test_a_resumed_plan_has_the_same_groups() -> None:
    lengths = random_lengths(203)
    plan = plan_batches(training(**BY_MODALITY), 5, lengths)
    uninterrupted = list(plan.from_step(0))
    for first in (1, 11, 13, 20):
        for step, expected in zip(plan.from_step(first), uninterrupted[first:], strict=True):
            assert step.samples.tolist() == expected.samples.tolist()
