"""Rungs divide finetuning into equal parts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylava.tune.study import RUNGS
from raylava.tune.trial import Rungs


@given(st.integers(1, 200))
def test_rungs_divide_training_of_any_length_and_end_with_its_last_step(steps: int) -> None:
    rungs = Rungs()
    reached = [result for step in range(1, steps + 1) if (result := rungs.record_loss(step, steps, float(step)))]
    assert [rung for rung, _ in reached] == sorted({rung for rung, _ in reached})
    assert reached[-1][0] == RUNGS
    assert len(reached) == min(steps, RUNGS)
    if steps >= RUNGS:
        assert reached[0][1] == pytest.approx((1 + -(-steps // RUNGS)) / 2)
