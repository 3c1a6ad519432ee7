"""A plan counts the stages that variants share before anything runs."""

from collections import Counter
from pathlib import Path

from raylava.artifacts import Artifact
from raylava.config.recipe import Model
from raylava.storage import storage_path
from raylava.tune.runner import SweepRun
from raylava.tune.sweep import load_sweep
from raylava.tune.sweep_plan import plan_sweep
from tests.support.sweeps import write_sweep_with_broken_model


def test_plan_counts_shared_stages_before_anything_runs(toy_assets: Artifact, toy_model: Model, tmp_path: Path) -> None:
    sweep_file = write_sweep_with_broken_model(tmp_path, toy_assets, toy_model)
    run = SweepRun(load_sweep(sweep_file), [], storage_path(tmp_path))
    plan = plan_sweep(run.planned_variants(), storage_path(tmp_path))
    assert Counter((stage.label, stage.users) for stage in plan.planned_stages) == {
        ("prepare alignment", 2): 1,
        ("pretrain", 1): 2,
        ("prepare instruction", 4): 1,
        ("finetune", 1): 4,
        ("evaluate heldout", 1): 4,
    }
