"""Sharing within a stage: a variant that trains longer starts from the end of one that trains shorter.

Two training stages share their first steps exactly if they differ in nothing but their length and the learning rate
does not depend on it (a constant schedule without warm-up): the batch plan of an epoch depends on the seed and the
epoch alone, and resuming from a checkpoint repeats a run bit by bit.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from raylava.pipeline.stage import Stage
from raylava.pipeline.stages import CONTINUED_FROM, TrainStage
from raylava.train.step_log import FINAL_STATE


@dataclass(frozen=True)
class PrefixPlan:
    """Which variants provide prefixes.

    `extended` are the fingerprints of the training stages from whose end other variants continue. `providers` has, for
    each variant, the numbers of the variants with the shorter stages that it continues from.
    """

    extended: frozenset[str]
    providers: tuple[tuple[int, ...], ...]


def plan_prefixes(variants: Sequence[Sequence[Stage]]) -> PrefixPlan:
    """Determine which training stages of the variants, given by their stages, are prefixes of others.

    A stage that is complete needs no prefix, and is none unless its final state was kept.
    """
    shared = _by_length(variants)
    extended, providers = set[str](), list[tuple[int, ...]]()
    for stages in variants:
        needed: set[int] = set()
        for stage in _training_stages(stages):
            lengths = shared.get(stage.prefix_key or "", {})
            if not lengths or stage.spec().find() is not None:
                continue
            shorter = [(number, provider) for number, provider in lengths.values() if provider.length < stage.length]
            usable = [(number, provider) for number, provider in shorter if provider.can_be_continued]
            extended |= {provider.spec().fingerprint for _, provider in usable}
            needed |= {number for number, _ in usable}
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


def linked_stages(variants: Sequence[Sequence[Stage]], plan: PrefixPlan) -> list[list[Stage]]:
    """Return the stages of all variants with the prefixes of a plan, see `with_prefixes`."""
    return [
        with_prefixes(stages, [variants[number] for number in providers], plan.extended)
        for stages, providers in zip(variants, plan.providers, strict=True)
    ]


def with_recorded_prefixes(variants: Sequence[Sequence[Stage]]) -> list[list[Stage]]:
    """Return the stages of variants, each training stage after those of other variants from which it was continued."""
    known = {stage.spec().fingerprint: stage for stages in variants for stage in _training_stages(stages)}

    def chain(stage: Stage) -> list[Stage]:
        artifact = stage.spec().find() if isinstance(stage, TrainStage) else None
        provider = known.get(artifact.metrics.get(CONTINUED_FROM, "")) if artifact else None
        return [*(chain(provider.as_prefix(None)) if provider else []), stage]

    return [[linked for stage in stages for linked in chain(stage)] for stages in variants]


def unneeded_states(variants: Sequence[Sequence[Stage]]) -> list[TrainStage]:
    """Return the stages whose final state was kept although every longer stage of the variants is complete."""
    unneeded = []
    for stages in _by_length(variants).values():
        for length, (_, stage) in stages.items():
            longer = [other for other_length, (_, other) in stages.items() if other_length > length]
            if longer and all(other.spec().find() for other in longer) and (stage.spec().path / FINAL_STATE).exists():
                unneeded.append(stage)
    return unneeded


def _by_length(variants: Sequence[Sequence[Stage]]) -> dict[str, dict[int, tuple[int, TrainStage]]]:
    """Return the first variant and its stage by length, by what the stages have in common; at least two lengths."""
    by_key: dict[str, dict[int, tuple[int, TrainStage]]] = {}
    for number, stages in enumerate(variants):
        for stage in _training_stages(stages):
            if stage.prefix_key is not None:
                by_key.setdefault(stage.prefix_key, {}).setdefault(stage.length, (number, stage))
    return {key: lengths for key, lengths in by_key.items() if len(lengths) > 1}


def _training_stages(stages: Sequence[Stage]) -> list[TrainStage]:
    return [stage for stage in stages if isinstance(stage, TrainStage)]
