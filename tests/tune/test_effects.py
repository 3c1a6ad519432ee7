"""An effect is measured between variants that differ in one axis alone, and its interval says how sure one may be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylava.tune.effects import Graded, effects

AXES = {"connector": ["random", "pretrained"], "vision": ["clip", "dinov2"]}


def answers(rate: float, seed: int, questions: int = 400) -> dict[str, bool]:
    generator = np.random.default_rng(seed)
    return {f"q{number}": bool(generator.random() < rate) for number in range(questions)}


def grid(rate: dict[str, float], seeds: int = 3) -> list[Graded]:
    """The full grid, where only the connector changes how often an answer is right."""
    return [
        Graded({"connector": connector, "vision": vision}, seed, answers(rate[connector], 7 * seed + hash_of(vision)))
        for connector in AXES["connector"]
        for vision in AXES["vision"]
        for seed in range(seeds)
    ]


def hash_of(name: str) -> int:
    return 1000 * AXES["vision"].index(name)


def test_an_effect_that_is_there_is_found_and_one_that_is_not_spans_zero() -> None:
    connector, vision = effects(grid({"random": 0.5, "pretrained": 0.7}), AXES)
    assert (connector.level, connector.against, connector.pairs, connector.questions) == (
        "pretrained",
        "random",
        6,
        400,
    )
    assert connector.difference == pytest.approx(0.2, abs=0.05)
    assert 0 < connector.low < connector.difference < connector.high
    assert not connector.spans_zero
    assert vision.spans_zero


def test_only_variants_that_differ_in_the_axis_alone_are_paired() -> None:
    graded = [
        one
        for one in grid({"random": 0.5, "pretrained": 0.7})
        if one.levels != {"connector": "random", "vision": "dinov2"}
    ]
    connector, vision = effects(graded, AXES)
    assert (connector.pairs, vision.pairs) == (3, 3)
    assert effects(graded[:3], AXES) == []


def test_seeds_that_disagree_widen_the_interval() -> None:
    steady = [
        Graded({"a": level}, seed, answers(rate, seed)) for seed in range(4) for level, rate in (("x", 0.5), ("y", 0.6))
    ]
    torn = [
        Graded({"a": level}, seed, answers(rate + (0.3 if level == "y" else 0) * (-1) ** seed, seed))
        for seed in range(4)
        for level, rate in (("x", 0.5), ("y", 0.6))
    ]
    (sure,), (unsure,) = effects(steady, {"a": ["x", "y"]}), effects(torn, {"a": ["x", "y"]})
    assert not sure.spans_zero
    assert unsure.spans_zero
    assert unsure.high - unsure.low > 3 * (sure.high - sure.low)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.lists(st.booleans(), min_size=1, max_size=30))
def test_the_effect_is_the_difference_of_the_scores_and_turns_its_sign(one: list[bool], other: list[bool]) -> None:
    count = min(len(one), len(other))
    graded = [
        Graded({"a": level}, None, {f"q{n}": right for n, right in enumerate(given[:count])})
        for level, given in (("x", one), ("y", other))
    ]
    (found,) = effects(graded, {"a": ["x", "y"]})
    (turned,) = effects(graded, {"a": ["y", "x"]})
    assert found.difference == pytest.approx((sum(other[:count]) - sum(one[:count])) / count)
    assert turned.difference == pytest.approx(-found.difference)
    assert found.low <= found.difference + 1e-9
    assert found.difference <= found.high + 1e-9


def test_answers_to_different_questions_are_refused() -> None:
    graded = [Graded({"a": "x"}, 0, {"q1": True}), Graded({"a": "y"}, 0, {"q2": True})]
    with pytest.raises(ValueError, match="answered different questions: q1, q2"):
        effects(graded, {"a": ["x", "y"]})
