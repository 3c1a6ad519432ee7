"""How far off `raylava estimate` is: predicted beside measured, for two sizes of recipe and for 1, 2 and 4 workers.

    raylava toy toy
    python jobs/bench/estimate.py [--steps 80] [--only-workers]

Calibrates, predicts, then trains the same stages for real (Ray Train, DeepSpeed) and reads their metrics. Takes about
twenty minutes on two cores.
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
from raylava.estimate.forecast import KnownCorpora, forecast
from raylava.estimate.local_machine import on_this_machine, workloads
from raylava.estimate.workload import prepared
from raylava.perf.search import DeviceBudget
from raylava.storage import storage_path
from raylava.toy.language import LanguageSize, build_language_model

RECIPE = Path(__file__).parents[1] / "recipes" / "toy.yaml"
MIDDLE = LanguageSize(width=320, layers=8, heads=8, key_value_heads=1, steps=1, batch=2)
LOOPBACK = 1e9  # bytes/s, two processes of one machine over gloo


def overrides(size: str, folder: Path, steps: int, workers: int) -> list[str]:
    """The recipe's settings for one measurement."""
    found = [
        "evaluate=[]",
        f"resources.workers={workers}",
        f"finetune.max_steps={steps}",
        f"pretrain.max_steps={steps}",
    ]
    return [*found, f"model.language.name={folder}"] if size == "middle" else found


def trained(changes: list[str], storage: Path) -> dict[str, tuple[float, float]]:
    """Seconds of a step (the median: Ray's own processes still start during the first) and of the stage."""
    command = ["raylava", "run", str(RECIPE), *changes, "--storage", str(storage), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found = {}
    for label, artifact in json.loads(done.stdout).items():
        if label in ("pretrain", "finetune"):
            lines = (Path(artifact["path"]) / "metrics.jsonl").read_text().splitlines()
            steps = [json.loads(line)["seconds"] for line in lines]
            record = json.loads((Path(artifact["path"]) / "artifact.json").read_text())
            found[label] = (statistics.median(steps), float(record["seconds"]))
    return found


def corpora(recipe: Recipe, changes: list[str], storage: Path) -> KnownCorpora:
    """The recipe's corpora, prepared."""
    command = ["raylava", "run", str(RECIPE), *changes, "--only", "prepare", "--storage", str(storage), "--json"]
    done = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    made: dict[Any, Any] = {
        label.removeprefix("prepare "): prepared(storage_path(one["path"])) for label, one in done.items()
    }
    return KnownCorpora(made, {})


def timed(recipe: Recipe, given: KnownCorpora) -> None:
    """Time a few steps of each stage here."""
    for stage, workload in workloads(recipe, given).items():
        with tempfile.TemporaryDirectory() as folder:
            calibrate(recipe, stage, workload, Path(folder))


def compared(size: str, folder: Path, steps: int, storage: Path, table: Table) -> None:
    """A row a stage: seconds of a step and of the stage."""
    changes = overrides(size, folder, steps, workers=2)
    recipe = load_recipe(str(RECIPE), changes)
    given = corpora(recipe, changes, storage)
    timed(recipe, given)
    predicted = forecast(recipe, on_this_machine(recipe, given), given, weighs_all=False)
    measured = trained(changes, storage)
    for stage in predicted.stages:
        step, whole = measured[stage.stage]
        parameters = f"{stage.model.shape.parameters / 1e6:.1f} M"
        add(table, f"{size} ({parameters}), {stage.stage}", "s/step", stage.asked.seconds.total, step)
        add(table, f"{size} ({parameters}), {stage.stage}", "s, the stage", stage.seconds, whole)


def scaled(folder: Path, steps: int, storage: Path, table: Table) -> None:
    """Finetuning with 1, 2 and 4 workers, predicted from what was timed with one."""
    alone = load_recipe(str(RECIPE), overrides("middle", folder, steps, workers=1))
    given = corpora(alone, overrides("middle", folder, steps, workers=1), storage)
    timed(alone, given)
    target = on_this_machine(alone, given)
    for workers in (1, 2, 4):
        changes = overrides("middle", folder, steps, workers)
        share = min(1.0, (os.cpu_count() or 1) / workers)
        one = target.speed_of("finetune")
        speed = replace(
            one,
            flops_per_s=one.flops_per_s * share,
            s_per_pack=one.s_per_pack / share,
            s_per_step=one.s_per_step / share,
        )
        room = DeviceBudget(target.room.device, None, workers, LOOPBACK)
        there = replace(target, room=room, speeds={"finetune": speed, "pretrain": speed})
        predicted = forecast(load_recipe(str(RECIPE), changes), there, given, weighs_all=False).stages[-1]
        step, _ = trained(changes, storage / f"{workers}")["finetune"]
        add(table, f"middle, finetune, {workers} workers", "s/step", predicted.asked.seconds.total, step)


def add(table: Table, what: str, unit: str, predicted: float, measured: float) -> None:
    """A row."""
    table.add_row(what, unit, f"{predicted:.3f}", f"{measured:.3f}", f"{predicted / measured - 1:+.0%}")
    sys.stderr.write(f"{what} {unit} {predicted:.3f} {measured:.3f}\n")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=80, help="of each stage")
    parser.add_argument("--only-workers", action="store_true", help="1, 2 and 4 workers alone")
    arguments = parser.parse_args()
    table = Table("what", title="predicted and measured", title_justify="left")
    for heading in ("", "predicted", "measured", "off"):
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory(prefix="raylava-bench-") as name:
        folder = Path(name)
        build_language_model(folder / "gemma", MIDDLE, 0, lambda: None)
        for size in () if arguments.only_workers else ("toy", "middle"):
            compared(size, folder / "gemma", arguments.steps, folder / "storage", table)
        scaled(folder / "gemma", arguments.steps // 5, folder / "storage", table)
    Console(file=sys.stdout, width=110).print(table)


if __name__ == "__main__":
    main()
