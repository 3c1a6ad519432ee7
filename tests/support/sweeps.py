"""Sweeps on the tiny backbones of the toy assets, for tests with and without Ray."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from raylava.artifacts import Artifact
from raylava.config.recipe import Model
from raylava.toy.demo import toy_recipe

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
    """Write a sweep over the connector and two language models, one of which has a NaN in its embedding."""
    broken = folder / "broken-gemma"
    shutil.copytree(toy_model.language.name, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][7, 3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    write_base_recipe(folder, toy_assets, SMALL_RECIPE)
    axes = {
        "language": {
            "sound": {"model.language.name": toy_model.language.name},
            "broken": {"model.language.name": str(broken)},
        },
        "connector": {"pretrained": {"pretrain.enabled": True}, "random": {"pretrain.enabled": False}},
    }
    settings = {"finetune.max_consecutive_skips": 1, "pretrain.max_consecutive_skips": 1}
    return write_sweep(folder, "small", axes=axes, set=settings)
