"""A search's budget counts time and money over all of its runs."""

import json
from pathlib import Path

from raylava.artifacts import Artifact
from raylava.pipeline.graph import build_stages
from raylava.pipeline.results import device_hours_per_second
from raylava.pipeline.stages import TrainStage
from raylava.storage import StoragePath, storage_path
from raylava.toy.demo import toy_recipe
from raylava.train.step_log import METRICS_LOG
from raylava.tune.budget import SearchBudget, TrainingHours
from raylava.tune.variants import Variant
from tests.support.studies import resume_study


def test_search_budget_continues_from_the_time_spent_by_earlier_runs(tmp_path: Path) -> None:
    file = storage_path(tmp_path / "spent.json")
    assert not SearchBudget(file, 1.0).exhausted()
    assert json.loads(file.read_bytes())["seconds"] >= 0.0
    file.write_bytes(json.dumps({"seconds": 3599.999}).encode())
    assert SearchBudget(file, 2.0).spent_seconds >= 3599.999
    assert not SearchBudget(file, 2.0).exhausted()
    assert SearchBudget(file, 0.9).exhausted()


def test_search_without_a_limit_is_never_exhausted_and_writes_no_file(tmp_path: Path) -> None:
    assert not SearchBudget(storage_path(tmp_path / "spent.json"), None, cost=lambda: 1e9).exhausted()
    assert not (tmp_path / "spent.json").exists()


def test_search_ends_when_its_training_has_cost_enough(tmp_path: Path) -> None:
    cost = [9.0]
    budget = SearchBudget(storage_path(tmp_path / "spent.json"), None, max_cost=10.0, cost=lambda: cost[0])
    assert not budget.exhausted()
    cost[0] = 10.0
    assert budget.exhausted()


def test_device_hours_are_those_of_all_distinct_stages_of_all_drivers(
    variant: Variant, folder: StoragePath, tmp_path: Path, toy_assets: Artifact
) -> None:
    recipe = toy_recipe(toy_assets.path, ["pretrain.enabled=false", "evaluate=[]"])
    stages = build_stages(recipe, storage_path(tmp_path))
    training = [stage for stage in stages if isinstance(stage, TrainStage)]
    step = {"step": 0, "step_time_s": 1800.0, "data_wait_fraction": 0.5}
    first = resume_study(variant, folder)
    first.next_settings("shared", True)
    first.on_trial_complete("shared", {"failure": "out of memory"})
    study = resume_study(variant, folder)
    study.next_settings("also shared", True)
    hours = TrainingHours([study], lambda variant, record: training)
    assert hours() == 0
    (training[0].spec().path / METRICS_LOG).write_bytes(json.dumps(step).encode() + b"\n")
    assert hours() == device_hours_per_second(variant.recipe.resources) * 3600, "one hour, once, though two trials ran"
