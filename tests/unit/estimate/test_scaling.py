"""Finetuning simulated at several cluster sizes."""

from raylava.config.load import load_recipe
from raylava.estimate.forecast import KnownCorpora
from raylava.estimate.scaling import simulate_scaling
from raylava.estimate.simulate import FailureModel
from raylava.perf.hardware import DEVICES, make_cluster
from raylava.perf.step_time import nominal_speed
from raylava.toy.demo import recipes_folder


def test_scaling_is_worthwhile_up_to_the_global_batch_size() -> None:
    recipe = load_recipe(str(recipes_folder() / "llava-gemma-2b.yaml"), [])
    cluster, speed = make_cluster(1, 8, "h100"), nominal_speed(DEVICES["h100"])
    report = simulate_scaling(recipe, cluster, speed, KnownCorpora({}, {}), FailureModel(), nodes=(1, 8, 64))
    assert report.worthwhile_size in (8, 64)
    assert report.scaled[-1].efficiency < report.scaled[0].efficiency
    assert 0.9 < report.goodput <= 1
