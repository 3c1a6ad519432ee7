"""The epoch plan: which samples form step k, packed how, on which rank. Pure functions of the recipe and the lengths.

    step k  = samples permutation[k·B : (k+1)·B]       B = the global batch, in samples
    pack_batch  = step → per rank, packs of at most `max_tokens_per_pack`

Which samples form a step depends on the seed, the epoch and B alone; world size and packing only decide who computes
what. Every rank gets the same number of packs, so that collectives can't fall out of step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raylava.corpus.blocks import Lengths
from raylava.errors import UserError

Pack = tuple[int, ...]  # sample numbers that share one row; empty when a rank has nothing left to compute

_LOOKED_AT = 100_000  # samples, for the largest packs
_ATTENTION_TOKENS = (
    16_384  # cost(t) = t + t²/this: attention's share of a Gemma-2B layer reaches the rest at about there
)


@dataclass(frozen=True)
class Step:
    """Step `number` of the whole run, counted from 0, and its samples in the plan's order."""

    number: int
    epoch: int
    samples: npt.NDArray[np.int64]


@dataclass(frozen=True)
class ShuffleWindows:
    """How a corpus lies in blocks, for shuffling one that no node's disk holds: rows and bytes of each block, and the
    bytes of the window that samples are shuffled in.
    """

    rows: tuple[int, ...]
    bytes: tuple[int, ...]
    window_bytes: float

    def fit_one_window(self) -> bool:
        """Whether the whole corpus is one window, so that its shuffle is the ordinary one."""
        return sum(self.bytes) <= self.window_bytes


@dataclass(frozen=True)
class BatchPlan:
    """All steps of a run over `samples` samples. The last step of an epoch may be short; none is dropped.

    With `windows` that don't fit one window, an epoch visits blocks in random order, a window of them at a time.
    """

    samples: int
    global_batch_size: int
    epochs: int
    seed: int
    max_steps: int | None = None
    windows: ShuffleWindows | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.global_batch_size)

    @property
    def steps(self) -> int:
        """Steps in all."""
        total = self.steps_per_epoch * self.epochs
        return total if self.max_steps is None else min(total, self.max_steps)

    def from_step(self, first: int) -> Iterator[Step]:
        """The steps from number `first` on: the data cursor of a checkpoint is this one integer."""
        order: npt.NDArray[np.int64] | None = None
        for number in range(first, self.steps):
            epoch, place = divmod(number, self.steps_per_epoch)
            if order is None or place == 0:
                order = self._order(epoch)
            batch = order[place * self.global_batch_size : (place + 1) * self.global_batch_size]
            yield Step(number, epoch, batch)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if self.windows is None or self.windows.fit_one_window():
            return permutation(self.samples, self.seed, epoch)
        return windowed_permutation(self.windows, self.seed, epoch)


def permutation(samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of an epoch: the same on every machine for the same seed and epoch."""
    return _generator(seed, epoch).permutation(samples)


def windowed_permutation(windows: ShuffleWindows, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """An epoch's order that touches few blocks at a time: blocks shuffled, then samples within windows of blocks.

    A sample's place is uniform over its window, and the windows are new random sets of blocks each epoch; two samples
    of one block always lie within one window's length of each other, which is all that a whole shuffle has over it.
    """
    generator = _generator(seed, epoch)
    first = np.concatenate([[0], np.cumsum(windows.rows)])
    order: list[npt.NDArray[np.int64]] = []
    for window in _windows(generator.permutation(len(windows.rows)), windows):
        samples = np.concatenate([np.arange(first[block], first[block + 1]) for block in window])
        order.append(generator.permutation(samples))
    return np.concatenate(order)


def _windows(blocks: npt.NDArray[np.int64], windows: ShuffleWindows) -> Iterator[list[int]]:
    window: list[int] = []
    held = 0
    for block in blocks:
        if window and held + windows.bytes[block] > windows.window_bytes:
            yield window
            window, held = [], 0
        window.append(int(block))
        held += windows.bytes[block]
    yield window


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))


def pack_batch(
    samples: Sequence[int] | npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int32],
    world_size: int,
    max_tokens_per_pack: int,
) -> list[list[Pack]]:
    """For each rank, its packs of one step: every sample once, each pack within `max_tokens_per_pack`, as many packs for each.

    `lengths` are those of all samples, in expanded tokens. Samples go to the cheapest rank, longest first, then into
    each rank's packs first-fit-decreasing. Raises UserError for a sample longer than `max_tokens_per_pack`.
    """
    order = _longest_first(samples, lengths)
    if order and lengths[order[0]] > max_tokens_per_pack:
        raise UserError(
            f"a sample of {lengths[order[0]]} tokens does not fit max_tokens_per_pack={max_tokens_per_pack}; "
            "raise max_tokens_per_pack or lower the corpus's max_length"
        )
    ranks = _spread(order, lengths, world_size)
    packed = [_first_fit(rank, lengths, max_tokens_per_pack) for rank in ranks]
    most = max(len(packs) for packs in packed)
    return [_padded(_split(packs, most), most) for packs in packed]


def worst_case_packs(lengths: Lengths, max_tokens_per_pack: int, samples: int) -> tuple[Pack, Pack, Pack]:
    """Three packs of at most so many samples that a step's hardly exceed: the fullest in tokens, in images, and in
    supervised tokens, whose logits weigh as much as all else. Filled greedily, by share of a sample and by number.

    For the memory dry run before the first step: what memory does for these it does for all.
    """
    tokens = lengths.length

    def fullest(what: npt.NDArray[np.int32]) -> Pack:
        packs = [_filled(_greatest(order), tokens, max_tokens_per_pack, samples) for order in (what / tokens, what)]
        return max(packs, key=lambda pack: int(what[list(pack)].sum()))

    return (
        _filled(_greatest(tokens), tokens, max_tokens_per_pack, samples),
        fullest(lengths.images),
        fullest(lengths.loss_tokens),
    )


def _greatest(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Places of the greatest values, falling; of very many the first hundred thousand."""
    if len(values) <= _LOOKED_AT:
        return np.argsort(-values, kind="stable")
    found = np.argpartition(-values, _LOOKED_AT)[:_LOOKED_AT]
    return found[np.argsort(-values[found], kind="stable")]


def _filled(
    order: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32], max_tokens_per_pack: int, samples: int
) -> Pack:
    pack: list[int] = []
    room, shortest = max_tokens_per_pack, int(lengths.min())
    for sample in order:
        if room < shortest or len(pack) == samples:
            break
        if lengths[sample] <= room:
            pack.append(int(sample))
            room -= int(lengths[sample])
    return tuple(pack)


def cost(length: int) -> float:
    """What a sample costs, in tokens of a short sample: linear layers grow with t, attention with t²."""
    return length + length * length / _ATTENTION_TOKENS


def _longest_first(samples: Sequence[int] | npt.NDArray[np.int64], lengths: npt.NDArray[np.int32]) -> list[int]:
    return sorted((int(sample) for sample in samples), key=lambda sample: (-int(lengths[sample]), sample))


def _spread(order: list[int], lengths: npt.NDArray[np.int32], world_size: int) -> list[list[int]]:
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    load = [0.0] * world_size
    for sample in order:
        rank = load.index(min(load))
        ranks[rank].append(sample)
        load[rank] += cost(int(lengths[sample]))
    return ranks


def _first_fit(samples: list[int], lengths: npt.NDArray[np.int32], max_tokens_per_pack: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room: list[int] = []
    for sample in samples:
        length = int(lengths[sample])
        fitting = next((number for number, left in enumerate(room) if left >= length), None)
        if fitting is None:
            packs.append([sample])
            room.append(max_tokens_per_pack - length)
        else:
            packs[fitting].append(sample)
            room[fitting] -= length
    return packs


def _split(packs: list[list[int]], count: int) -> list[list[int]]:
    """Cut the packs that hold the most samples in two until there are `count`, or none can be cut."""
    packs = list(packs)
    while len(packs) < count and any(len(pack) > 1 for pack in packs):
        largest = max(range(len(packs)), key=lambda number: len(packs[number]))
        pack = packs.pop(largest)
        packs += [pack[::2], pack[1::2]]
    return packs


def _padded(packs: list[list[int]], count: int) -> list[Pack]:
    return [tuple(pack) for pack in packs] + [()] * (count - len(packs))
