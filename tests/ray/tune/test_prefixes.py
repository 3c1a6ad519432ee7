"""A sweep over epochs trains the longest variant's epochs once; its models are those of separate runs, bit by bit."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from raylava.artifacts import Artifact
from raylava.storage import storage_path
from raylava.train.step_log import FINAL_STATE, METRICS_LOG, STEP_LOG
from raylava.tune.report import render_markdown
from tests.support.sweeps import SMALL_RECIPE, run_sweep, write_base_recipe, write_sweep

SETTINGS = {
    "pretrain.enabled": False,
    "evaluate": [],
    "finetune.lr_schedule": "constant",
    "finetune.warmup_ratio": 0,
    "finetune.global_batch_size": 12,
}


def steps(model: Path, log: str = STEP_LOG) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (model / log).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


@pytest.mark.usefixtures("ray_cluster")
def test_sweep_over_epochs_trains_each_epoch_once_and_gives_the_models_of_separate_runs(
    toy_assets: Artifact, tmp_path: Path
) -> None:
    write_base_recipe(tmp_path, toy_assets, SMALL_RECIPE)
    axes = {"epochs": {str(count): {"finetune.epochs": count} for count in (3, 1, 2)}}
    shared_file = write_sweep(tmp_path, "shared", axes=axes, set=SETTINGS)
    separate_file = write_sweep(tmp_path, "separate", axes={"epochs": {"3": axes["epochs"]["3"]}}, set=SETTINGS)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    _, shared = run_sweep(shared_file, tmp_path / "one")
    _, separate = run_sweep(separate_file, tmp_path / "two")
    assert [row.trial.outcome for row in shared.rows] == ["done"] * 3
    three, one, two = (Path(str(row.artifacts["finetune"].path)) for row in shared.rows)
    (alone,) = (Path(str(row.artifacts["finetune"].path)) for row in separate.rows)

    per_epoch = len(steps(one))
    assert per_epoch == 4
    assert [len(steps(model)) for model in (one, two, three)] == [per_epoch, 2 * per_epoch, 3 * per_epoch]
    trained = [[step["step"] for step in steps(model, METRICS_LOG)] for model in (one, two, three)]
    assert [step for model in trained for step in model] == list(range(3 * per_epoch)), "3 epochs, not 6"

    assert steps(three) == steps(alone)
    weights, expected = load_file(three / "model.safetensors"), load_file(alone / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(value) for name, value in expected.items())

    assert [len(points) for _, points in shared.loss_curves()] == [3 * per_epoch, per_epoch, 2 * per_epoch]
    assert shared.total_device_hours < 0.8 * shared.unshared_device_hours
    assert "sharing saved" in render_markdown(shared)
    assert not any((storage_path(model) / FINAL_STATE).exists() for model in (one, two, three))
