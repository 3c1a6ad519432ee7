"""A plan counts the stages that variants share before anything runs."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from raylava.artifacts import Artifact
from raylava.config.recipe import Model
from raylava.corpus import source_cache
from raylava.storage import StoragePath, storage_path
from raylava.toy.demo import recipes_folder
from raylava.tune.runner import SweepRun
from raylava.tune.sweep import load_sweep
from raylava.tune.sweep_plan import SweepPlan, plan_of_results, plan_sweep
from raylava.tune.variants import TrialResult
from tests.support.sweeps import write_sweep_with_broken_model


def test_plan_counts_shared_stages_before_anything_runs(toy_assets: Artifact, toy_model: Model, tmp_path: Path) -> None:
    sweep_file = write_sweep_with_broken_model(tmp_path, toy_assets, toy_model)
    run = SweepRun(load_sweep(sweep_file), [], storage_path(tmp_path))
    plan = plan_sweep(run.planned_variants(), storage_path(tmp_path))
    assert Counter((stage.label, stage.users) for stage in plan.planned_stages) == {
        ("prepare alignment", 1): 1,
        ("pretrain", 1): 1,
        ("prepare instruction", 3): 1,
        ("finetune", 1): 3,
        ("evaluate heldout", 1): 3,
    }


def test_plan_trials_and_report_resolve_each_source_once(
    toy_assets: Artifact, toy_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []
    list_images = source_cache.file_sizes

    def count(root: StoragePath, names: set[str]) -> dict[str, int]:
        listed.append(root.uri)
        return list_images(root, names)

    monkeypatch.setattr(source_cache, "file_sizes", count)
    run = SweepRun(
        load_sweep(write_sweep_with_broken_model(tmp_path, toy_assets, toy_model)), [], storage_path(tmp_path)
    )
    variants = run.planned_variants()
    plan = plan_sweep(variants, storage_path(tmp_path), run.inputs)
    assert len(run._stages) == len(variants), "what the capacity check and the recipes of trials need"
    results = [TrialResult(variant, "done") for variant in variants]
    report = plan_of_results(results, storage_path(tmp_path), run.inputs)
    assert [stage.fingerprint for stage in report.planned_stages] == [
        stage.fingerprint for stage in plan.planned_stages
    ]
    assert len(listed) == 2, "the alignment and the instruction corpus"


PlanShipped = Callable[[str], SweepPlan]


@pytest.fixture
def plan_shipped(toy_assets: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlanShipped:
    """Return a function that plans a shipped sweep of toy models."""
    (tmp_path / "toy").symlink_to(toy_assets.path.path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)  # the sweeps refer to ./toy, as created by `raylava toy toy`

    def plan(name: str) -> SweepPlan:
        run = SweepRun(load_sweep(str(recipes_folder() / name)), [], storage_path(tmp_path))
        return plan_sweep(run.planned_variants(), storage_path(tmp_path))

    return plan


def test_shipped_learning_rates_share_the_connector_of_their_seed(plan_shipped: PlanShipped) -> None:
    plan = plan_shipped("toy-learning-rates.yaml")
    assert Counter((stage.stage, stage.users) for stage in plan.planned_stages) == {
        ("prepare", 6): 2,
        ("pretrain", 3): 2,
        ("finetune", 1): 6,
        ("evaluate", 1): 6,
    }


def test_shipped_toy_ablations_share_every_stage_that_two_variants_have_in_common(plan_shipped: PlanShipped) -> None:
    plan = plan_shipped("toy-ablations.yaml")
    assert len(plan.variants) == 24
    assert Counter((stage.stage, stage.users) for stage in plan.planned_stages) == {
        ("prepare", 12): 1,  # the alignment corpus: half of the variants train no connector
        ("prepare", 24): 1,
        ("pretrain", 1): 12,
        ("finetune", 1): 24,
        ("evaluate", 1): 24,
    }
