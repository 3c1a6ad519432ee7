"""`raylava estimate --simulate`, which simulates runs on up to 4,096 GPUs and takes too long for a unit test."""

import json
from pathlib import Path

import pytest

from raylava.cli import main
from raylava.toy.demo import recipes_folder

RECIPE = str(recipes_folder() / "llava-gemma-2b.yaml")


def test_finetuning_is_simulated_at_scale(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpu", "a100", "--simulate", "--spot", "0.05", "--storage", str(tmp_path), "--json"]
    assert main(["estimate", RECIPE, *arguments]) == 0
    data = json.loads(capfd.readouterr().out)
    sizes = [run["workers"] for run in data["simulated"]["scaled"]]
    assert (sizes[0], sizes[-1]) == (8, 4096)
    assert data["simulated"]["failures"]["reclaims_per_node_hour"] == 0.05
