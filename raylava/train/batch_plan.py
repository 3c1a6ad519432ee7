"""The batch plan: the samples of each step, and their packing for each rank. Pure functions of recipe and lengths.

    step k        = samples order[k·B : (k+1)·B]              B = global batch size, in samples
    loss_weights  : step → the weight of each sample's loss tokens
    pack_batch    : step → packs of at most `max_tokens_per_pack`, for each rank

The samples of a step, their loss groups and their weights depend on the settings that enter the fingerprint only; world
size and pack size determine which rank computes them. Every rank gets the same number of packs: collectives match.
"""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raylava.config.recipe import Training
from raylava.corpus.blocks import Lengths
from raylava.corpus.shuffle import EpochOrder, Shuffle, ShuffleWindows
from raylava.errors import UserError

Pack = tuple[int, ...]  # numbers of the samples that share one row; empty when a rank has none left

_MAX_CANDIDATES = 100_000  # samples considered for the worst-case packs
_PART = 4_000_000  # samples looked at together
_ATTENTION_EQUAL_TOKENS = 16_384  # length at which attention costs as much as the rest of a Gemma 2B layer


@dataclass(frozen=True)
class Step:
    """Step `number` of the run, counted from 0, and its sample numbers in plan order.

    Where the loss is a mean over groups of N samples, group g is `samples[g·N : (g+1)·N]`.
    """

    number: int
    epoch: int
    samples: npt.NDArray[np.int64]


@dataclass(frozen=True)
class LossGroups:
    """The groups of `size` samples over whose means a step's loss is the mean.

    `lengths` are the expanded lengths of all samples where groups have similar lengths; without them a group's samples
    are consecutive in the plan.
    """

    size: int
    lengths: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True)
class BatchPlan:
    """All steps of a run over `samples` samples. The last step of an epoch may be smaller; no sample is dropped.

    A corpus that exceeds one shuffle window is visited in windows of randomly ordered blocks. With `images`, the number
    of images of each sample, a step has samples with images or samples without (see corpus/shuffle.py). A step's loss
    is the mean over the means of `groups`, or over its loss tokens without them.
    """

    samples: int
    global_batch_size: int
    epochs: int
    seed: int
    max_steps: int | None = None
    windows: ShuffleWindows | None = None
    images: npt.NDArray[np.int32] | None = None
    groups: LossGroups | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.global_batch_size)

    @property
    def steps(self) -> int:
        """Return the number of steps of the run."""
        total = self.steps_per_epoch * self.epochs
        return total if self.max_steps is None else min(total, self.max_steps)

    def from_step(self, first: int) -> Iterator[Step]:
        """Yield the steps from number `first` on. This integer is the whole data state of a checkpoint."""
        shuffle = Shuffle(self.samples, self.seed, self.global_batch_size, self.windows, self.images)
        order: EpochOrder | None = None
        for number in range(first, self.steps):
            epoch, index = divmod(number, self.steps_per_epoch)
            if order is None or index == 0:
                order = shuffle.order(epoch)
            start = index * self.global_batch_size
            batch = order.samples[start : start + self.global_batch_size].astype(np.int64)
            yield Step(number, epoch, batch if start >= order.remainder else self._grouped(batch))

    def loss_weights(self, step: Step, loss_tokens: npt.NDArray[np.int32]) -> list[float]:
        """Return the weight of each loss token in the step's loss, by sample in plan order.

        Over all loss tokens of the step the weights sum up to 1. `loss_tokens` counts them by sample number.
        """
        tokens = loss_tokens[step.samples].astype(np.float64)
        if self.groups is None:
            return [1.0 / tokens.sum()] * len(tokens)
        group = np.arange(len(tokens)) // self.groups.size
        tokens_of_group = np.bincount(group, weights=tokens)
        weights: list[float] = (1.0 / (len(tokens_of_group) * tokens_of_group[group])).tolist()
        return weights

    def description(self) -> str:
        """Describe what a step's samples have in common, and how its loss is weighted."""
        kind = "any samples" if self.images is None else "samples with images, or samples without"
        if self.groups is None:
            return f"{kind}; loss is the mean over loss tokens"
        if self.groups.size == 1:
            return f"{kind}; loss is the mean over samples"
        similar = "" if self.groups.lengths is None else " of similar length"
        return f"{kind}; loss is the mean over groups of {self.groups.size} samples{similar}"

    def _grouped(self, batch: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if self.groups is None or self.groups.lengths is None:
            return batch
        return group_by_length(batch, self.groups.lengths, self.global_batch_size // self.groups.size)


def plan_batches(training: Training, seed: int, lengths: Lengths, windows: ShuffleWindows | None = None) -> BatchPlan:
    """Return the batch plan of a training stage over samples of these lengths."""
    groups = None
    if training.loss_weighting != "tokens":
        similar = training.loss_weighting == "groups" and training.loss_grouping == "by_length"
        groups = LossGroups(training.loss_group_size or 1, lengths.length if similar else None)
    return BatchPlan(
        len(lengths),
        training.global_batch_size,
        training.epochs,
        seed,
        training.max_steps,
        windows,
        lengths.images if training.batching == "by_modality" else None,
        groups,
    )


def group_by_length(
    samples: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32], groups: int
) -> npt.NDArray[np.int64]:
    """Return the samples in an order whose consecutive groups, `groups` of equal size, have similar total lengths.

    Longest first, each sample joins the shortest group that is not full; if the groups cannot have equal sizes, they
    take turns. This is LLaVA's `split_to_even_chunks`, with tokens where LLaVA counts words.
    """
    order = samples[np.argsort(-lengths[samples], kind="stable")]
    if len(order) % groups:
        return np.concatenate([order[start::groups] for start in range(groups)])
    size = len(order) // groups
    chunks: list[list[int]] = [[] for _ in range(groups)]
    totals = [0.0] * groups
    for sample in order.tolist():
        shortest = totals.index(min(totals))
        chunks[shortest].append(sample)
        totals[shortest] = totals[shortest] + int(lengths[sample]) if len(chunks[shortest]) < size else math.inf
    return np.concatenate([np.asarray(chunk, dtype=np.int64) for chunk in chunks])


def pack_batch(
    samples: Sequence[int] | npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int32],
    world_size: int,
    max_tokens_per_pack: int,
) -> list[list[Pack]]:
    """Distribute the samples of one step: return each rank's packs, the same number for every rank.

    Every sample is in exactly one pack, and no pack exceeds `max_tokens_per_pack`. `lengths` are the expanded lengths
    of all samples. Samples go to the rank with the least work, longest first, then into its packs by first-fit
    decreasing. Raises UserError for a sample longer than `max_tokens_per_pack`.
    """
    numbers = np.asarray(samples, dtype=np.int64).tolist()
    lengths_of = dict(zip(numbers, lengths[numbers].tolist(), strict=True)) if numbers else {}
    order = sorted(numbers, key=lambda sample: (-lengths_of[sample], sample))
    if order and lengths_of[order[0]] > max_tokens_per_pack:
        raise UserError(
            f"a sample of {lengths_of[order[0]]} tokens does not fit max_tokens_per_pack={max_tokens_per_pack}; "
            "raise max_tokens_per_pack or lower the corpus's max_length"
        )
    ranks = _assign_ranks(order, lengths_of, world_size)
    packed = [_first_fit(samples_of_rank, lengths_of, max_tokens_per_pack) for samples_of_rank in ranks]
    count = max(len(packs) for packs in packed)
    return [_pad(_split(packs, count), count) for packs in packed]


def worst_case_packs(lengths: Lengths, max_tokens_per_pack: int, samples: int) -> tuple[Pack, Pack, Pack]:
    """Return the worst-case packs (most tokens, most images, most loss tokens) for the memory dry run.

    Each has at most `samples` samples. They are filled greedily, by the share of a sample and by the count, and a run's
    packs rarely need more memory.
    """
    tokens = lengths.length

    def fullest(counts: npt.NDArray[np.int32]) -> Pack:
        orders = (_descending(counts, tokens), _descending(counts))
        packs = [_fill_pack(order, tokens, max_tokens_per_pack, samples) for order in orders]
        return max(packs, key=lambda pack: int(counts[list(pack)].sum()))

    return (
        _fill_pack(_descending(tokens), tokens, max_tokens_per_pack, samples),
        fullest(lengths.images),
        fullest(lengths.loss_tokens),
    )


def _descending(values: npt.NDArray[Any], divisor: npt.NDArray[Any] | None = None) -> npt.NDArray[np.int64]:
    """Return the indices of the largest values, or quotients, in descending order, at most _MAX_CANDIDATES of them.

    The arrays may be memory-mapped files of any length; a part of them is in memory at a time.
    """
    candidates = np.empty(0, dtype=np.int64)
    for start in range(0, len(values), _PART):
        part = np.arange(start, min(start + _PART, len(values)))
        candidates = _largest(np.concatenate([candidates, part]), values, divisor)
    ranking = _ranking(candidates, values, divisor)
    return candidates[np.lexsort((candidates, -ranking))]


def _largest(
    candidates: npt.NDArray[np.int64], values: npt.NDArray[Any], divisor: npt.NDArray[Any] | None
) -> npt.NDArray[np.int64]:
    if len(candidates) <= _MAX_CANDIDATES:
        return candidates
    return candidates[np.argpartition(-_ranking(candidates, values, divisor), _MAX_CANDIDATES)[:_MAX_CANDIDATES]]


def _ranking(
    candidates: npt.NDArray[np.int64], values: npt.NDArray[Any], divisor: npt.NDArray[Any] | None
) -> npt.NDArray[Any]:
    return values[candidates] if divisor is None else values[candidates] / divisor[candidates]


def _fill_pack(
    order: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32], max_tokens_per_pack: int, samples: int
) -> Pack:
    pack: list[int] = []
    free, shortest = max_tokens_per_pack, int(lengths.min())
    for sample in order:
        if free < shortest or len(pack) == samples:
            break
        if lengths[sample] <= free:
            pack.append(int(sample))
            free -= int(lengths[sample])
    return tuple(pack)


def sample_cost(length: int) -> float:
    """Return a sample's compute cost in tokens of a short sample: linear layers grow with t, attention with t²."""
    return length + length * length / _ATTENTION_EQUAL_TOKENS


def _assign_ranks(order: list[int], lengths: Mapping[int, int], world_size: int) -> list[list[int]]:
    """Give each sample, longest first, to the rank with the least work, the lowest of several."""
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0.0, rank) for rank in range(world_size)]
    for sample in order:
        load, rank = loads[0]
        ranks[rank].append(sample)
        heapq.heapreplace(loads, (load + sample_cost(lengths[sample]), rank))
    return ranks


def _first_fit(samples: list[int], lengths: Mapping[int, int], max_tokens_per_pack: int) -> list[list[int]]:
    packs: list[list[int]] = []
    free: list[int] = []
    for sample in samples:
        length = lengths[sample]
        fitting = next((number for number, space in enumerate(free) if space >= length), None)
        if fitting is None:
            packs.append([sample])
            free.append(max_tokens_per_pack - length)
        else:
            packs[fitting].append(sample)
            free[fitting] -= length
    return packs


def _split(packs: list[list[int]], count: int) -> list[list[int]]:
    """Split the packs with the most samples in two until there are `count`, or none can be split."""
    packs = list(packs)
    while len(packs) < count and any(len(pack) > 1 for pack in packs):
        largest = max(range(len(packs)), key=lambda number: len(packs[number]))
        pack = packs.pop(largest)
        packs += [pack[::2], pack[1::2]]
    return packs


def _pad(packs: list[list[int]], count: int) -> list[Pack]:
    return [tuple(pack) for pack in packs] + [()] * (count - len(packs))
