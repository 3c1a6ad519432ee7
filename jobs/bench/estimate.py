"""Error of `raylava estimate`: predicted and measured times of two model sizes, and of 1, 2 and 4 workers.

    raylava toy toy
    python jobs/bench/estimate.py [--steps 80] [--only-workers]

Calibrates, predicts, then trains the same stages (Ray Train, DeepSpeed) and reads their metrics. Takes about twenty
minutes on two cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from raylava.config.load import load_recipe
from raylava.config.recipe import Recipe
from raylava.estimate.calibrate import calibrate
from raylava.estimate.forecast import KnownCorpora, Target, forecast
from raylava.estimate.local_machine import local_target, workloads
from raylava.estimate.workload import prepared_corpus
from raylava.perf.search import DeviceBudget
from raylava.storage import storage_path
from raylava.toy.language import LanguageSize, build_language_model

RECIPE = Path(__file__).parents[1] / "recipes" / "toy.yaml"
MIDDLE = LanguageSize(width=320, layers=8, heads=8, key_value_heads=1, steps=1, batch=2)
LOOPBACK = 1e9  # bytes/s between two processes on one machine over gloo


def overrides(size: str, model_folder: Path, steps: int, workers: int) -> list[str]:
    """Return the recipe overrides of one measurement."""
    settings = [
        "evaluate=[]",
        f"resources.workers={workers}",
        f"finetune.max_steps={steps}",
        f"pretrain.max_steps={steps}",
    ]
    return [*settings, f"model.language.name={model_folder}"] if size == "middle" else settings


def run_recipe(settings: list[str], storage: Path, *options: str) -> dict[str, Any]:
    """Run the recipe and return its artifacts by stage label."""
    command = ["raylava", "run", str(RECIPE), *settings, *options, "--storage", str(storage), "--json"]
    artifacts: dict[str, Any] = json.loads(
        subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    )
    return artifacts


def measure_training(settings: list[str], storage: Path) -> dict[str, tuple[float, float]]:
    """Train the recipe and return (seconds per step, seconds of the stage) of each training stage.

    The step time is the median, because Ray's own processes are still starting during the first steps.
    """
    seconds = {}
    for label, artifact in run_recipe(settings, storage).items():
        if label in ("pretrain", "finetune"):
            lines = (Path(artifact["path"]) / "metrics.jsonl").read_text().splitlines()
            step_times = [json.loads(line)["step_time_s"] for line in lines]
            record = json.loads((Path(artifact["path"]) / "artifact.json").read_text())
            seconds[label] = (statistics.median(step_times), float(record["seconds"]))
    return seconds


def prepare_corpora(settings: list[str], storage: Path) -> KnownCorpora:
    """Prepare the recipe's corpora and return their sizes."""
    artifacts = run_recipe(settings, storage, "--only", "prepare")
    corpora: dict[Any, Any] = {
        label.removeprefix("prepare "): prepared_corpus(storage_path(artifact["path"]))
        for label, artifact in artifacts.items()
    }
    return KnownCorpora(corpora, {})


def calibrate_stages(recipe: Recipe, known: KnownCorpora) -> None:
    """Calibrate each stage of the recipe on this machine."""
    for stage, workload in workloads(recipe, known).items():
        with tempfile.TemporaryDirectory() as folder:
            calibrate(recipe, stage, workload, Path(folder))


def compare_stages(size: str, model_folder: Path, steps: int, storage: Path, table: Table) -> None:
    """Add predicted and measured times of each stage to the table."""
    settings = overrides(size, model_folder, steps, workers=2)
    recipe = load_recipe(str(RECIPE), settings)
    known = prepare_corpora(settings, storage)
    calibrate_stages(recipe, known)
    prediction = forecast(recipe, local_target(recipe, known), known, compare_all=False)
    measured = measure_training(settings, storage)
    for stage in prediction.stages:
        step_time, stage_time = measured[stage.stage]
        label = f"{size} ({stage.model.shape.parameters / 1e6:.1f} M), {stage.stage}"
        add_row(table, label, "s/step", stage.planned.seconds.total, step_time)
        add_row(table, label, "s, whole stage", stage.seconds, stage_time)


def compare_workers(model_folder: Path, steps: int, storage: Path, table: Table) -> None:
    """Add finetuning with 1, 2 and 4 workers to the table, predicted from a calibration with one worker."""
    settings = overrides("middle", model_folder, steps, workers=1)
    recipe = load_recipe(str(RECIPE), settings)
    known = prepare_corpora(settings, storage)
    calibrate_stages(recipe, known)
    calibrated = local_target(recipe, known)
    for workers in (1, 2, 4):
        settings = overrides("middle", model_folder, steps, workers)
        target = scale_target(calibrated, workers)
        prediction = forecast(load_recipe(str(RECIPE), settings), target, known, compare_all=False).stages[-1]
        step_time, _ = measure_training(settings, storage / f"{workers}")["finetune"]
        add_row(table, f"middle, finetune, {workers} workers", "s/step", prediction.planned.seconds.total, step_time)


def scale_target(target: Target, workers: int) -> Target:
    """Return a target that was calibrated with one worker for `workers` workers that share this machine's cores."""
    share = min(1.0, (os.cpu_count() or 1) / workers)
    speed = target.speed_of("finetune")
    speed = replace(
        speed,
        flops_per_s=speed.flops_per_s * share,
        s_per_pack=speed.s_per_pack / share,
        s_per_step=speed.s_per_step / share,
    )
    budget = DeviceBudget(target.budget.device, None, workers, LOOPBACK)
    return replace(target, budget=budget, speeds={"finetune": speed, "pretrain": speed})


def add_row(table: Table, label: str, unit: str, predicted: float, measured: float) -> None:
    """Add one comparison to the table, and print it to stderr at once."""
    table.add_row(label, unit, f"{predicted:.3f}", f"{measured:.3f}", f"{predicted / measured - 1:+.0%}")
    sys.stderr.write(f"{label} {unit} {predicted:.3f} {measured:.3f}\n")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=80, help="steps per stage")
    parser.add_argument("--only-workers", action="store_true", help="compare only 1, 2 and 4 workers")
    arguments = parser.parse_args()
    table = Table("run", title="predicted and measured", title_justify="left")
    for heading in ("unit", "predicted", "measured", "error"):
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory(prefix="raylava-bench-") as name:
        folder = Path(name)
        build_language_model(folder / "gemma", MIDDLE, 0, lambda: None)
        for size in () if arguments.only_workers else ("toy", "middle"):
            compare_stages(size, folder / "gemma", arguments.steps, folder / "storage", table)
        compare_workers(folder / "gemma", arguments.steps // 5, folder / "storage", table)
    Console(file=sys.stdout, width=110).print(table)


if __name__ == "__main__":
    main()
