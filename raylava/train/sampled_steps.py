"""A step's work by the size of packs, from some of a run's steps: what the slowest rank computes, and the fullest pack.

Pure functions of lengths and the plan; training and the estimate both weigh ways to train by them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raylava.corpus.blocks import Lengths
from raylava.perf.flops import StepFlops, step_flops
from raylava.perf.memory import PackShape, TrainableModel
from raylava.perf.step_time import JobSpec
from raylava.train.batch_plan import BatchPlan, Pack, pack_batch, worst_case_packs

Samples = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SampledSteps:
    """Some steps of a run: their samples, and `global_batch_size`, the most that one has."""

    model: TrainableModel
    lengths: Lengths
    steps: tuple[Samples, ...]
    global_batch_size: int

    @property
    def tokens(self) -> float:
        """Of a step, the mean."""
        return float(np.mean([self.lengths.length[step].sum() for step in self.steps]))

    def flops(self) -> StepFlops:
        """Of all ranks together in the step that has the median of them."""
        found = sorted((self._flops(step.tolist()) for step in self.steps), key=lambda one: one.total)
        return found[len(found) // 2]

    def work(self, world_size: int) -> Callable[[int], JobSpec]:
        """A step's work by the size of packs, on the rank that has most to do: a mean over the steps."""

        def at(max_tokens_per_pack: int) -> JobSpec:
            found = [
                self.slowest(pack_batch(step, self.lengths.length, world_size, max_tokens_per_pack))
                for step in self.steps
            ]
            packs, flops, forward = (np.array([one[part] for one in found], dtype=float) for part in range(3))
            return JobSpec(
                load=self._fullest(max_tokens_per_pack),
                packs=float(packs.mean()),
                most_packs=int(packs.max()),
                flops=float(flops.mean()),
                body_forward=float(forward.mean()),
                images=float(self.lengths.images.mean()) * self.global_batch_size / world_size,
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
            int(lengths.loss_tokens[samples].sum()),
            self.model.language,
            self.model.vision,
        )

    def _fullest(self, max_tokens_per_pack: int) -> PackShape:
        """What a pack hardly exceeds, in each respect."""
        packs = worst_case_packs(self.lengths, max_tokens_per_pack, self.global_batch_size)
        tokens, loss_tokens, images = (
            max(int(what[list(pack)].sum()) for pack in packs)
            for what in (self.lengths.length, self.lengths.loss_tokens, self.lengths.images)
        )
        return PackShape(tokens, loss_tokens, max(1, images))


def sample_steps(plan: BatchPlan, most: int) -> tuple[Samples, ...]:
    """The samples of so many steps at most, evenly over the run."""
    numbers: Sequence[int] = np.linspace(0, plan.steps - 1, min(plan.steps, most)).astype(int).tolist()
    return tuple(next(plan.from_step(number)).samples for number in numbers)
