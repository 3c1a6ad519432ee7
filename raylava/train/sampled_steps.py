"""The workload of a training step by pack size, estimated from a sample of a run's steps.

Pure functions of sample lengths and the batch plan; training and `raylava estimate` rank execution configs by them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raylava.corpus.blocks import Lengths
from raylava.perf.flops import StepFlops, step_flops
from raylava.perf.memory import PackShape, TrainableModel
from raylava.perf.step_time import StepWorkload
from raylava.train.batch_plan import BatchPlan, Pack, pack_batch, worst_case_packs

SampleNumbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SampledSteps:
    """Steps sampled from a run: the sample numbers of each. No step has more than `global_batch_size` samples."""

    model: TrainableModel
    lengths: Lengths
    steps: tuple[SampleNumbers, ...]
    global_batch_size: int

    @property
    def tokens(self) -> float:
        """Return the mean number of tokens per step."""
        return float(np.mean([self.lengths.length[step].sum() for step in self.steps]))

    def flops(self) -> StepFlops:
        """Return the FLOPs that the median step requires, over all ranks, whatever its attention computes besides."""
        steps = [self._flops([(sample,) for sample in step.tolist()], causal=True) for step in self.steps]
        return sorted(steps, key=lambda flops: flops.total)[len(steps) // 2]

    def workload(self, world_size: int) -> Callable[[int], StepWorkload]:
        """Return a function from max_tokens_per_pack to the mean workload of the slowest rank."""

        def workload_at(max_tokens_per_pack: int) -> StepWorkload:
            slowest_ranks = [
                self.slowest_rank(pack_batch(step, self.lengths.length, world_size, max_tokens_per_pack))
                for step in self.steps
            ]
            packs, flops, forward = np.array(slowest_ranks, dtype=float).T
            return StepWorkload(
                pack_shape=self._worst_case_shape(max_tokens_per_pack),
                packs=float(packs.mean()),
                max_packs=int(packs.max()),
                flops=float(flops.mean()),
                body_forward=float(forward.mean()),
                images=float(self.lengths.images.mean()) * self.global_batch_size / world_size,
            )

        return workload_at

    def slowest_rank(self, ranks: list[list[Pack]]) -> tuple[int, float, float]:
        """Return (packs per rank, FLOPs of the rank that executes most, forward FLOPs of its language model body)."""
        flops = [self._executed_flops(packs) for packs in ranks]
        slowest = max(flops, key=lambda rank: rank.total)
        return len(ranks[0]), slowest.total, slowest.body.forward

    def _executed_flops(self, packs: Sequence[Pack]) -> StepFlops:
        """Return the FLOPs that packs take: dense attention computes all pairs of a pack's tokens, before the mask."""
        if self.model.dense_attention:
            return self._flops(packs, causal=False)
        return self._flops([(sample,) for pack in packs for sample in pack], causal=True)

    def _flops(self, groups: Sequence[Pack], causal: bool) -> StepFlops:
        """Return the FLOPs of samples; those of one group attend to each other."""
        lengths, samples = self.lengths, [sample for group in groups for sample in group]
        return step_flops(
            self.model.shape,
            [int(lengths.length[list(group)].sum()) for group in groups],
            int(lengths.images[samples].sum()),
            int(lengths.loss_tokens[samples].sum()),
            self.model.trains_language,
            self.model.trains_vision,
            causal,
        )

    def _worst_case_shape(self, max_tokens_per_pack: int) -> PackShape:
        """Return the largest tokens, loss tokens and images of any worst-case pack."""
        packs = worst_case_packs(self.lengths, max_tokens_per_pack, self.global_batch_size)
        tokens, loss_tokens, images = (
            max(int(counts[list(pack)].sum()) for pack in packs)
            for counts in (self.lengths.length, self.lengths.loss_tokens, self.lengths.images)
        )
        return PackShape(tokens, loss_tokens, max(1, images))


def sample_steps(plan: BatchPlan, max_steps: int) -> tuple[SampleNumbers, ...]:
    """Return the sample numbers of up to `max_steps` steps, evenly spaced over the run."""
    numbers: Sequence[int] = np.linspace(0, plan.steps - 1, min(plan.steps, max_steps)).astype(int).tolist()
    return tuple(next(plan.from_step(number)).samples for number in numbers)
