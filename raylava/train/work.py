"""A step's work by the size of packs, from some of a run's steps: what the slowest rank computes, and the fullest pack.

Pure functions of lengths and the plan; training and the estimate both weigh ways to train by them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raylava.corpus.blocks import Lengths
from raylava.cost.flops import StepFlops, step_flops
from raylava.cost.memory import Load, Trained
from raylava.cost.speed import Work
from raylava.train.plan import EpochPlan, Pack, assign, largest_packs

Samples = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sampled:
    """Some steps of a run: their samples, and `global_batch`, the most that one has."""

    model: Trained
    lengths: Lengths
    steps: tuple[Samples, ...]
    global_batch: int

    @property
    def tokens(self) -> float:
        """Of a step, the mean."""
        return float(np.mean([self.lengths.length[step].sum() for step in self.steps]))

    def flops(self) -> StepFlops:
        """Of all ranks together in the step that has the median of them."""
        found = sorted((self._flops(step.tolist()) for step in self.steps), key=lambda one: one.total)
        return found[len(found) // 2]

    def work(self, world_size: int) -> Callable[[int], Work]:
        """A step's work by the size of packs, on the rank that has most to do: a mean over the steps."""

        def at(pack_tokens: int) -> Work:
            found = [self.slowest(assign(step, self.lengths.length, world_size, pack_tokens)) for step in self.steps]
            packs, flops, forward = (np.array([one[part] for one in found], dtype=float) for part in range(3))
            return Work(
                load=self._fullest(pack_tokens),
                packs=float(packs.mean()),
                most_packs=int(packs.max()),
                flops=float(flops.mean()),
                body_forward=float(forward.mean()),
                images=float(self.lengths.images.mean()) * self.global_batch / world_size,
            )

        return at

    def slowest(self, ranks: list[list[Pack]]) -> tuple[int, float, float]:
        """Of one step's packs by rank: how many each has; FLOPs of the rank with most, and its body's forward."""
        flops = [self._flops([sample for pack in packs for sample in pack]) for packs in ranks]
        most = max(flops, key=lambda one: one.total)
        return len(ranks[0]), most.total, most.body.forward

    def _flops(self, samples: list[int]) -> StepFlops:
        lengths = self.lengths
        return step_flops(
            self.model.shape,
            [int(length) for length in lengths.length[samples]],
            int(lengths.images[samples].sum()),
            int(lengths.supervised[samples].sum()),
            self.model.language,
            self.model.vision,
        )

    def _fullest(self, pack_tokens: int) -> Load:
        """What a pack hardly exceeds, in each respect."""
        packs = largest_packs(self.lengths, pack_tokens, self.global_batch)
        tokens, supervised, images = (
            max(int(what[list(pack)].sum()) for pack in packs)
            for what in (self.lengths.length, self.lengths.supervised, self.lengths.images)
        )
        return Load(tokens, supervised, max(1, images))


def sampled(plan: EpochPlan, most: int) -> tuple[Samples, ...]:
    """The samples of so many steps at most, evenly over the run."""
    numbers: Sequence[int] = np.linspace(0, plan.steps - 1, min(plan.steps, most)).astype(int).tolist()
    return tuple(next(plan.from_step(number)).samples for number in numbers)
