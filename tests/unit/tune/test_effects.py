"""Effects are estimated from variants that differ in a single axis, with intervals over runs and questions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylava.tune.effects import GradedVariant, estimate_effects

AXES = {"connector": ["random", "pretrained"], "vision": ["clip", "dinov2"]}


def random_scores(rate: float, seed: int, questions: int = 400) -> dict[str, bool]:
    generator = np.random.default_rng(seed)
    return {f"q{number}": bool(generator.random() < rate) for number in range(questions)}


def full_grid(rates: dict[str, float], seeds: int = 3) -> list[GradedVariant]:
    """Return the full grid of AXES, in which only the connector changes the rate of correct answers."""
    return [
        GradedVariant(
            {"connector": connector, "vision": vision},
            seed,
            random_scores(rates[connector], 7 * seed + seed_offset(vision)),
        )
        for connector in AXES["connector"]
        for vision in AXES["vision"]
        for seed in range(seeds)
    ]


def seed_offset(vision: str) -> int:
    return 1000 * AXES["vision"].index(vision)


def test_real_effect_is_detected_and_absent_effect_spans_zero() -> None:
    connector, vision = estimate_effects(full_grid({"random": 0.5, "pretrained": 0.7}), AXES)
    assert (connector.level, connector.reference_level, connector.pairs, connector.questions) == (
        "pretrained",
        "random",
        6,
        400,
    )
    assert connector.difference == pytest.approx(0.2, abs=0.05)
    assert 0 < connector.low < connector.difference < connector.high
    assert not connector.spans_zero
    assert vision.spans_zero


def test_only_variants_that_differ_in_a_single_axis_are_paired() -> None:
    variants = [
        variant
        for variant in full_grid({"random": 0.5, "pretrained": 0.7})
        if variant.levels != {"connector": "random", "vision": "dinov2"}
    ]
    connector, vision = estimate_effects(variants, AXES)
    assert (connector.pairs, vision.pairs) == (3, 3)
    assert estimate_effects(variants[:3], AXES) == []


def test_disagreeing_seeds_widen_the_interval() -> None:
    consistent_runs = [
        GradedVariant({"a": level}, seed, random_scores(rate, seed))
        for seed in range(4)
        for level, rate in (("x", 0.5), ("y", 0.6))
    ]
    disagreeing_runs = [
        GradedVariant({"a": level}, seed, random_scores(rate + (0.3 if level == "y" else 0) * (-1) ** seed, seed))
        for seed in range(4)
        for level, rate in (("x", 0.5), ("y", 0.6))
    ]
    (narrow,) = estimate_effects(consistent_runs, {"a": ["x", "y"]})
    (wide,) = estimate_effects(disagreeing_runs, {"a": ["x", "y"]})
    assert not narrow.spans_zero
    assert wide.spans_zero
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.lists(st.booleans(), min_size=1, max_size=30))
def test_effect_is_the_score_difference_and_changes_sign_with_the_reference_level(
    x_scores: list[bool], y_scores: list[bool]
) -> None:
    count = min(len(x_scores), len(y_scores))
    variants = [
        GradedVariant({"a": level}, None, {f"q{n}": correct for n, correct in enumerate(scores[:count])})
        for level, scores in (("x", x_scores), ("y", y_scores))
    ]
    (effect,) = estimate_effects(variants, {"a": ["x", "y"]})
    (reversed_effect,) = estimate_effects(variants, {"a": ["y", "x"]})
    assert effect.difference == pytest.approx((sum(y_scores[:count]) - sum(x_scores[:count])) / count)
    assert reversed_effect.difference == pytest.approx(-effect.difference)
    assert effect.low <= effect.difference + 1e-9
    assert effect.difference <= effect.high + 1e-9


def test_scores_of_different_questions_are_refused() -> None:
    variants = [GradedVariant({"a": "x"}, 0, {"q1": True}), GradedVariant({"a": "y"}, 0, {"q2": True})]
    with pytest.raises(ValueError, match="answered different questions: q1, q2"):
        estimate_effects(variants, {"a": ["x", "y"]})
