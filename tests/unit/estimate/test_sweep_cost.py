"""The cost of a sweep counts stages that variants share once."""

from collections import Counter

from raylava.estimate.forecast import KnownCorpora, gpu_target
from raylava.estimate.sweep_cost import shared_stages
from raylava.perf.hardware import DEVICES, make_cluster
from raylava.perf.step_time import nominal_speed
from raylava.toy.demo import recipes_folder
from raylava.tune.sweep import load_sweep
from raylava.tune.variants import variants


def test_stages_that_variants_share_are_counted_once() -> None:
    """2 language models × 2 towers × 3 seeds; half of the variants skip pretraining; one tokenizer for both models."""
    recipes = [variant.recipe for variant in variants(load_sweep(str(recipes_folder() / "ablations.yaml")), [])]
    target = gpu_target(make_cluster(1, 8, "h100", {}), nominal_speed(DEVICES["h100"]))
    stages = shared_stages(recipes, lambda *_: target, lambda _: KnownCorpora({}, {}))
    assert Counter(stage.stage for stage in stages) == {
        "prepare alignment": 2,
        "prepare instruction": 2,
        "pretrain": 12,
        "finetune": 24,
    }
    assert sum(stage.used_by for stage in stages if stage.stage == "prepare instruction") == 24
    assert {stage.used_by for stage in stages if stage.stage == "pretrain"} == {1}
