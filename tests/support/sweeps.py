"""Sweeps on the tiny backbones of the toy assets, for tests with and without Ray."""

import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from safetensors.torch import load_file, save_file

from raylava.artifacts import Artifact
from raylava.config.recipe import Model
from raylava.console import Console
from raylava.storage import storage_path
from raylava.toy.demo import toy_recipe
from raylava.tune.results import SweepResults
from raylava.tune.runner import SweepRun
from raylava.tune.sweep import load_sweep
from raylava.tune.sweep_plan import plan_of_results

SMALL_RECIPE = [
    "pretrain.global_batch_size=40",
    "finetune.global_batch_size=48",
    "finetune.epochs=1",
    "resources.workers=1",
    "evaluate.0.baselines=[]",
    "evaluate.0.batch_size=10",
]


def write_base_recipe(folder: Path, toy_assets: Artifact, overrides: list[str]) -> None:
    """Write base.yaml, the toy recipe on the toy assets, into `folder`."""
    recipe = toy_recipe(toy_assets.path, overrides)
    (folder / "base.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))


def write_sweep(folder: Path, name: str, **settings: Any) -> str:
    """Write a sweep of the folder's base.yaml and return the path of its file."""
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps({"name": name, "recipe": "base.yaml"} | settings))  # JSON is YAML
    return str(file)


def write_sweep_with_broken_model(folder: Path, toy_assets: Artifact, toy_model: Model) -> str:
    """Write a sweep of three variants over the connector and two language models, one with a NaN in its embedding.

    The vision backbone is DINOv2.
    """
    broken = folder / "broken-gemma"
    shutil.copytree(toy_model.language.name, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][7, 3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    dinov2 = toy_assets.path / "backbones" / "dinov2"
    write_base_recipe(folder, toy_assets, [*SMALL_RECIPE, f"model.vision.name={dinov2}"])
    axes = {
        "language": {
            "sound": {"model.language.name": toy_model.language.name},
            "broken": {"model.language.name": str(broken)},
        },
        "connector": {"pretrained": {"pretrain.enabled": True}, "random": {"pretrain.enabled": False}},
    }
    settings = {"finetune.max_consecutive_skips": 1, "pretrain.max_consecutive_skips": 1}
    exclude = [{"language": "broken", "connector": "pretrained"}]  # both broken variants would fail alike
    return write_sweep(folder, "small", axes=axes, exclude=exclude, set=settings)


def run_sweep(sweep_file: str, storage: Path, *overrides: str) -> tuple[SweepRun, SweepResults]:
    """Run a sweep as the command does; its terminal output is appended to console.txt."""
    run = SweepRun(load_sweep(sweep_file), list(overrides), storage_path(storage))
    with (storage / "console.txt").open("a") as stream:
        trials = run.run(Console(stream))
    return run, SweepResults(run.sweep, overrides, plan_of_results(trials, storage_path(storage)), trials)


def count_builds(run: SweepRun, results: SweepResults) -> Counter[str]:
    """Return how often a trial started to build each artifact, by its storage path."""
    paths = [{stage.label: str(stage.spec().path) for stage in stages} for stages in results.plan.stages]
    return Counter(
        trial_paths[label]
        for trial_paths, status in zip(paths, run.trial_statuses, strict=True)
        for label in status.built_stages
    )


def active_placement_groups() -> list[dict[str, Any]]:
    return [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


def wait_until_no_placement_group_is_left(seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while active_placement_groups():
        assert time.monotonic() < deadline, f"placement groups leaked: {active_placement_groups()}"
        time.sleep(0.2)
