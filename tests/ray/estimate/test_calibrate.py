"""A calibration on this machine predicts the step time of a run on it.

jobs/bench/estimate.py measures the error on an idle machine.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from raylava.artifacts import Artifact
from raylava.cli import main
from raylava.config.recipe import Recipe
from raylava.errors import RunError
from raylava.estimate.calibrate import Calibration, calibrate, load_calibration
from raylava.estimate.forecast import KnownCorpora, forecast
from raylava.estimate.local_machine import local_target, workloads
from raylava.estimate.workload import prepared_corpus
from raylava.storage import storage_path
from raylava.toy.demo import toy_recipe

SETTINGS = ["pretrain.enabled=false", "evaluate=[]", "resources.workers=1", "finetune.epochs=20"]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibrated")


@pytest.fixture(scope="module")
def recipe(toy_assets: Artifact) -> Recipe:
    return toy_recipe(toy_assets.path, SETTINGS)


@pytest.fixture(scope="module")
def recipe_file(toy_assets: Artifact, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The toy recipe on the tiny toy assets, written to a file."""
    file = tmp_path_factory.mktemp("recipe") / "toy.yaml"
    file.write_text(json.dumps(toy_recipe(toy_assets.path, []).model_dump(mode="json")))
    return str(file)


@pytest.fixture(scope="module")
def known(recipe: Recipe, recipe_file: str, storage: Path, ray_cluster: None) -> KnownCorpora:
    assert main(["run", recipe_file, *SETTINGS, "--only", "prepare", "--storage", str(storage)]) == 0
    (artifact,) = (storage / "prepare").iterdir()
    return KnownCorpora({"instruction": prepared_corpus(storage_path(artifact))}, {})


@pytest.fixture(scope="module")
def calibration(recipe: Recipe, known: KnownCorpora, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    (workload,) = workloads(recipe, known).values()
    return calibrate(recipe, "finetune", workload, tmp_path_factory.mktemp("timing"))


def test_a_calibration_is_reused_by_the_next_estimate(
    recipe: Recipe, known: KnownCorpora, calibration: Calibration
) -> None:
    (workload,) = workloads(recipe, known).values()
    assert load_calibration(recipe, "finetune", workload) == calibration
    speed = local_target(recipe, known).speed_of("finetune")
    assert speed == calibration.speed
    assert "measured on this machine: 8 steps, 1 workers on cpu" in speed.source


def test_a_calibration_is_not_reused_for_other_settings(
    recipe: Recipe, known: KnownCorpora, calibration: Calibration
) -> None:
    changed = recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update={"precision": "bf16"})})
    (workload,) = workloads(changed, known).values()
    assert load_calibration(changed, "finetune", workload) is None


def test_the_predicted_step_time_is_of_the_order_of_the_measured_one(
    recipe: Recipe, recipe_file: str, known: KnownCorpora, storage: Path, calibration: Calibration
) -> None:
    """Other tests run meanwhile and change the speed; jobs/bench/estimate.py measures the error on an idle machine."""
    stage = forecast(recipe, local_target(recipe, known), known, compare_all=False).stages[-1]
    command = [sys.executable, "-m", "raylava.cli", "train", recipe_file, "finetune", *SETTINGS]
    subprocess.run([*command, "--storage", str(storage)], check=True, capture_output=True)
    (metrics,) = (storage / "finetune").glob("*/metrics.jsonl")
    step_times = [json.loads(line)["step_time_s"] for line in metrics.read_text().splitlines()]
    assert len(step_times) == stage.steps
    assert 1 / 3 < stage.planned.seconds.total / statistics.median(step_times) < 3


def test_a_failing_rank_ends_the_calibration_with_an_error(recipe: Recipe, known: KnownCorpora, tmp_path: Path) -> None:
    (workload,) = workloads(recipe, known).values()
    no_folder = tmp_path / "file"
    no_folder.touch()
    with pytest.raises(RunError, match="timing finetune on this machine failed"):
        calibrate(recipe, "finetune", workload, no_folder)
