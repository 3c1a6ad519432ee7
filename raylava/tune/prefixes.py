"""Sharing within a stage: a variant that trains longer starts from the end of one that trains shorter. Pure.

Two training stages share their first steps exactly if they differ in nothing but their length and the learning rate
does not depend on it (a constant schedule without warm-up): the batch plan of an epoch depends on the seed and the
epoch alone, and resuming from a checkpoint repeats a run bit by bit.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from raylava.pipeline.stage import Stage
from raylava.pipeline.stages import TrainStage


@dataclass(frozen=True)
class PrefixPlan:
    """Which variants provide prefixes.

    `extended` are the fingerprints of the training stages from whose end other variants continue. `providers` has, for
    each variant, the numbers of the variants with the shorter stages that it continues from.
    """

    extended: frozenset[str]
    providers: tuple[tuple[int, ...], ...]


def plan_prefixes(variants: Sequence[Sequence[Stage]]) -> PrefixPlan:
    """Determine which training stages of the variants, given by their stages, are prefixes of others."""
    by_key: dict[str, dict[int, tuple[str, int]]] = {}  # length → fingerprint and first variant, by what must be equal
    for number, stages in enumerate(variants):
        for stage in _training_stages(stages):
            if stage.prefix_key is not None:
                entry = (stage.spec().fingerprint, number)
                by_key.setdefault(stage.prefix_key, {}).setdefault(stage.length, entry)
    extended, providers = set(), []
    for stages in variants:
        needed: set[int] = set()
        for stage in _training_stages(stages):
            shorter = [
                entry for length, entry in by_key.get(stage.prefix_key or "", {}).items() if length < stage.length
            ]
            extended |= {fingerprint for fingerprint, _ in shorter}
            needed |= {number for _, number in shorter}
        providers.append(tuple(sorted(needed)))
    return PrefixPlan(frozenset(extended), tuple(providers))


def with_prefixes(
    stages: Sequence[Stage], providers: Sequence[Sequence[Stage]], extended: Collection[str]
) -> list[Stage]:
    """Return the stages of a variant, each training stage after the shorter ones of `providers` that it continues from.

    Stages in `extended` keep their final state for others.
    """
    linked: list[Stage] = []
    for stage in stages:
        if not isinstance(stage, TrainStage):
            linked.append(stage)
            continue
        shorter = {
            other.length: other
            for provider in providers
            for other in _training_stages(provider)
            if other.prefix_key is not None and other.prefix_key == stage.prefix_key and other.length < stage.length
        }
        prefix: TrainStage | None = None
        for length in sorted(shorter):
            prefix = shorter[length].as_prefix(prefix)
            linked.append(prefix)
        linked.append(stage.continuing(prefix, keep_state=stage.spec().fingerprint in extended))
    return linked


def _training_stages(stages: Sequence[Stage]) -> list[TrainStage]:
    return [stage for stage in stages if isinstance(stage, TrainStage)]
