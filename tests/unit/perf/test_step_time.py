"""A step's time is the sum of independent terms."""

import pytest

from raylava.config.recipe import Training
from raylava.perf.hardware import DEVICES
from raylava.perf.memory import PackShape, TrainableModel
from raylava.perf.search import recipe_candidates
from raylava.perf.step_time import StepWorkload, nominal_speed, step_time
from raylava.perf.traffic import Traffic
from tests.support.meta_models import llava_shape


def test_lower_bandwidth_only_increases_network_time() -> None:
    config = next(recipe_candidates(Training(), 2048))
    model = TrainableModel.of(llava_shape(), "finetune", Training())
    workload = StepWorkload(PackShape(2048, 409, 3), 6, 6, 2e14, 5e13, 16)
    traffic, speed = Traffic(1e9, 1e9, 0, 2), nominal_speed(DEVICES["h100"])
    fast, slow = (step_time(speed, workload, traffic, model, config, 8, bandwidth) for bandwidth in (450e9, 45e9))
    assert slow.compute == fast.compute
    assert slow.network == pytest.approx(10 * fast.network, rel=0.1)
