"""What is timed on this machine predicts a run on it. How well, on a quiet one, jobs/bench/estimate.py tells."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raylava.artifacts import Artifact
from raylava.cli.entry import main
from raylava.config.recipe import Language, Model, Recipe, Vision
from raylava.errors import RunError
from raylava.estimate.calibrate import Calibration, calibrate, load_calibration, random_llava
from raylava.estimate.forecast import KnownCorpora, forecast
from raylava.estimate.local_machine import on_this_machine, workloads
from raylava.estimate.synthetic import synthetic_pack
from raylava.estimate.workload import prepared
from raylava.models.llava import PackLoss, build_llava
from raylava.models.registry import resolve_vision
from raylava.models.shapes import VISION, model_shape
from raylava.perf.shapes import shape_from_config
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
def given(recipe: Recipe, recipe_file: str, storage: Path, ray_cluster: None) -> KnownCorpora:
    assert main(["run", recipe_file, *SETTINGS, "--only", "prepare", "--storage", str(storage)]) == 0
    (made,) = (storage / "prepare").iterdir()
    return KnownCorpora({"instruction": prepared(storage_path(made))}, {})


@pytest.fixture(scope="module")
def recipe_file(toy_assets: Artifact, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The micro recipe on the tiny toy assets, as a file."""
    file = tmp_path_factory.mktemp("recipe") / "toy.yaml"
    file.write_text(json.dumps(toy_recipe(toy_assets.path, []).model_dump(mode="json")))
    return str(file)


@pytest.fixture(scope="module")
def calibration(recipe: Recipe, given: KnownCorpora, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    (workload,) = workloads(recipe, given).values()
    return calibrate(recipe, "finetune", workload, tmp_path_factory.mktemp("timing"))


def test_what_was_timed_is_there_for_the_next_estimate(
    recipe: Recipe, given: KnownCorpora, calibration: Calibration
) -> None:
    (workload,) = workloads(recipe, given).values()
    assert load_calibration(recipe, "finetune", workload) == calibration
    speed = on_this_machine(recipe, given).speed_of("finetune")
    assert speed == calibration.speed
    assert "measured here: 8 steps, 1 workers on cpu" in speed.source


def test_other_settings_were_not_timed(recipe: Recipe, given: KnownCorpora, calibration: Calibration) -> None:
    changed = recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update={"precision": "bf16"})})
    (workload,) = workloads(changed, given).values()
    assert load_calibration(changed, "finetune", workload) is None


def test_a_run_takes_about_as_long_as_predicted(
    recipe: Recipe, recipe_file: str, given: KnownCorpora, storage: Path, calibration: Calibration
) -> None:
    """Within 40 % on a machine that may be busy; the bench holds it to 20 % on one that is not."""
    stage = forecast(recipe, on_this_machine(recipe, given), given, weighs_all=False).stages[-1]
    command = [sys.executable, "-m", "raylava.cli", "train", recipe_file, "finetune", *SETTINGS]
    subprocess.run([*command, "--storage", str(storage)], check=True, capture_output=True)
    (metrics,) = (storage / "finetune").glob("*/metrics.jsonl")
    seconds = [json.loads(line)["seconds"] for line in metrics.read_text().splitlines()]
    assert len(seconds) == stage.steps
    assert stage.asked.seconds.total == pytest.approx(statistics.median(seconds), rel=0.4)


def test_a_rank_that_fails_ends_the_timing(recipe: Recipe, given: KnownCorpora, tmp_path: Path) -> None:
    (workload,) = workloads(recipe, given).values()
    no_folder = tmp_path / "file"
    no_folder.touch()
    with pytest.raises(RunError, match="timing finetune on this machine failed"):
        calibrate(recipe, "finetune", workload, no_folder)


@pytest.mark.parametrize("tower", VISION)
def test_published_backbones_can_be_timed_without_their_weights(tower: str) -> None:
    """The module that stands for them is the one that training would assemble: its parameters are theirs."""
    model = Model(language=Language(name="google/gemma-2b-it"), vision=Vision(name=tower))
    with torch.device("meta"):
        llava = random_llava(model, torch.bfloat16, "varlen")
    assert sum(weight.numel() for weight in llava.parameters()) == model_shape(model).parameters


def test_noise_is_a_pack_that_the_model_takes(recipe: Recipe, toy_assets: Artifact) -> None:
    llava = build_llava(recipe.model, resolve_vision(recipe.model.vision), 0, torch.float32, "varlen")
    shape, token = shape_from_config(llava.config), llava.config.image_token_index
    patches = shape.vision.patches
    pack = synthetic_pack([(patches + 10, 1, 5), (7, 0, 3)], shape, token)
    assert pack.input_ids.shape == (1, patches + 17)
    assert len(pack.labels) == 8
    assert torch.equal(pack.input_ids[0, pack.target_positions + 1], pack.labels)
    assert torch.isfinite(PackLoss(llava)(**vars(pack)))
    blank = synthetic_pack([(7, 0, 3)], shape, token)
    assert blank.pixel_values.shape[0] == 1
    assert (blank.input_ids == token).sum() == patches
