"""A finetuning stage trained by `raylava train`, without Ray."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from raylava.config.recipe import Recipe
from raylava.train.step_log import STEP_LOG


def start_training(
    recipe: Recipe, folder: Path, processes: int, *overrides: str, storage: str | None = None
) -> "subprocess.Popen[str]":
    """`raylava train` of the recipe's finetuning, under torchrun where there are several processes.

    The recipe is written to `folder`, which is also the storage unless another one is given.
    """
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_dump(mode="json")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [*(torchrun if processes > 1 else [sys.executable, "-m"]), "raylava.cli", "train", str(file), "finetune"]
    return subprocess.Popen(
        [*command, "--storage", storage or str(folder), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish_training(run: "subprocess.Popen[str]", status: int = 0) -> str:
    """Wait for the run to end with the exit status; return its standard error."""
    _, err = run.communicate(timeout=300)
    assert run.returncode == status, err
    return err


def copy_inputs(storage: Path, target: Path) -> Path:
    """Copy the artifacts that finetuning reads to another storage."""
    for stage in ("prepare", "pretrain"):
        if (storage / stage).exists():
            shutil.copytree(storage / stage, target / stage)
    return target


def read_training(storage: Path) -> tuple[list[tuple[Any, ...]], bytes]:
    """Return the samples and loss of each finetuning step, and the bytes of the weights."""
    (folder,) = (storage / "finetune").iterdir()
    lines = [json.loads(line) for line in (folder / STEP_LOG).read_text().splitlines()]
    losses = [(line["step"], line["samples_sha256"], line["loss"]) for line in lines]
    return losses, (folder / "model.safetensors").read_bytes()
