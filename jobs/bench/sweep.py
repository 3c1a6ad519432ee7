"""A sweep of hundreds of trials: the driver's overhead and memory, and what a killed driver repeats or loses.

    python jobs/bench/sweep.py [--trials 200] [--kill-at 150] [--seconds 1] [--storage DIR] [--json]

A training stage is replaced by a task that holds the recipe's resources for a second (`--seconds`); everything else is
that of `raylava sweep`: variants, stages, artifacts, locks, Ray Tune, the report. The driver and its Ray cluster are
killed when `--kill-at` trainings are done, and the same command is started again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

POLL_SECONDS = 0.2
TRAINED = "trained"  # folder of the storage with a record of each training


def stub_trainable(seconds: float) -> Callable[[dict[str, Any]], None]:
    """Return a trial whose training stages hold their resources for `seconds`, and record that they ran."""

    def train(stage: Any, progress: Any) -> dict[str, Any]:
        import ray

        from raylava.cluster.roles import TRAIN, node_labels_for

        resources = stage._resources

        @ray.remote(
            num_cpus=resources.workers * resources.cpus_per_worker,
            num_gpus=resources.workers * resources.gpus_per_worker,
            label_selector=node_labels_for(TRAIN, resources),
            scheduling_strategy="DEFAULT",  # not in the placement group of the trial
        )
        def hold() -> tuple[float, float]:
            started = time.time()
            time.sleep(seconds)
            return started, time.time()

        started, ended = ray.get(hold.remote())
        record = {"fingerprint": stage.spec().fingerprint, "started": started, "ended": ended}
        (stage.storage / TRAINED / f"{uuid.uuid4().hex}.json").write_bytes(json.dumps(record).encode())
        progress.update(1, 1, loss=1.0)
        return {"final_loss": 1.0}

    def run_stub_trial(config: dict[str, Any]) -> None:
        from raylava.pipeline.stages import TrainStage
        from raylava.tune.trial import run_trial

        TrainStage.run = train  # type: ignore[method-assign]
        run_trial(config)

    return run_stub_trial


def drive(sweep_file: str, storage: str, seconds: float) -> None:
    """Run the sweep as `raylava sweep` does, write its report, and print the peak memory of this process in MB."""
    import resource

    from raylava.console import Console
    from raylava.storage import writable
    from raylava.tune.report import write_report
    from raylava.tune.results import SweepResults
    from raylava.tune.runner import SweepRun
    from raylava.tune.sweep import load_sweep
    from raylava.tune.sweep_plan import plan_of_results

    root = writable(storage)
    run = SweepRun(load_sweep(sweep_file), [], root)
    trials = run.run(Console(sys.stderr), trainable=stub_trainable(seconds))
    write_report(SweepResults(run.sweep, [], plan_of_results(trials, root), trials), run.folder)
    failed = [trial.failure for trial in trials if trial.outcome != "done"]
    if failed:
        raise SystemExit(f"{len(failed)} trials failed, the first: {failed[0]}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    sys.stdout.write(json.dumps({"trials": len(trials), "peak_mb": peak}) + "\n")


def write_sweep(folder: Path, trials: int) -> Path:
    """Write a recipe on a tiny corpus and barely trained backbones, and a sweep of it over `trials` seeds."""
    from raylava.storage import storage_path
    from raylava.toy.assets import ToyAssetsStage, ToySize, build_toy_assets
    from raylava.toy.demo import toy_recipe
    from raylava.toy.language import LanguageSize
    from raylava.toy.vision import VisionSize

    language = LanguageSize(width=16, layers=1, heads=2, key_value_heads=1, steps=1, batch=2)
    vision = VisionSize(width=16, layers=2, heads=2, steps=1, batch=2)
    size = ToySize(alignment=16, instruction=16, heldout=4, language=language, small=language, vision=vision)
    assets = ToyAssetsStage(storage_path(folder), size, seed=0).spec().path
    build_toy_assets(assets, size, seed=0)
    recipe = toy_recipe(assets, ["pretrain.enabled=false", "evaluate=[]", "resources.workers=1"])
    (folder / "base.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))  # JSON is YAML
    file = folder / "many.yaml"
    file.write_text(json.dumps({"name": "many", "recipe": "base.yaml", "seeds": list(range(trials))}))
    return file


def start_driver(sweep_file: Path, storage: str, seconds: float) -> "subprocess.Popen[str]":
    """Start the sweep in a separate process."""
    command = [sys.executable, __file__, "--drive", str(sweep_file), "--storage", storage, "--seconds", str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def kill_with_children(process: "subprocess.Popen[str]") -> None:
    """Kill the driver and its Ray cluster."""
    for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.communicate()


def trainings(storage: str) -> list[dict[str, Any]]:
    """Return the records of all trainings."""
    from raylava.storage import storage_path

    return [json.loads(file.read_bytes()) for file in (storage_path(storage) / TRAINED).children()]


def complete(storage: str) -> set[str]:
    """Return the fingerprints of the finished training stages."""
    from raylava.storage import storage_path

    files = (storage_path(storage) / "finetune").walk_files()
    return {name.partition("/")[0] for name, _ in files if name.endswith("/artifact.json")}


def concurrency(records: list[dict[str, Any]]) -> list[int]:
    """Return how many trainings ran at the same time in each second, from the first start to the last end."""
    first, last = min(record["started"] for record in records), max(record["ended"] for record in records)
    seconds = [first + second for second in range(int(last - first) + 1)]
    return [sum(record["started"] <= second < record["ended"] for record in records) for second in seconds]


def measure(trials: int, kill_at: int | None, seconds: float, storage: str, folder: Path) -> dict[str, Any]:
    """Run the sweep, with the driver killed once unless `kill_at` is None, and return the measurements."""
    sweep_file = write_sweep(folder, trials)
    started = time.monotonic()
    driver = start_driver(sweep_file, storage, seconds)
    killed_at, done = 0.0, set[str]()
    if kill_at is not None:
        while len(complete(storage)) < kill_at:
            if driver.poll() is not None:
                raise SystemExit("the sweep ended before the driver was to be killed")
            time.sleep(POLL_SECONDS)
        kill_with_children(driver)
        killed_at, done = time.time(), complete(storage)
        driver = start_driver(sweep_file, storage, seconds)
    output, _ = driver.communicate()
    if driver.returncode:
        raise SystemExit(f"the sweep failed with exit status {driver.returncode}")
    duration = time.monotonic() - started
    records = trainings(storage)
    counts = Counter(record["fingerprint"] for record in records)
    cpus = os.cpu_count() or 1
    return json.loads(output.splitlines()[-1]) | {
        "seconds": duration,
        "overhead_per_trial_s": (duration - trials * seconds / cpus) / trials,
        "complete_at_kill": len(done),
        "complete": len(complete(storage)),
        "concurrency": concurrency(records),
        "interrupted": sum(count - 1 for count in counts.values()),  # trained again, as they were not complete
        "repeated": sum(record["fingerprint"] in done and record["started"] > killed_at for record in records),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--kill-at", type=int, default=150, help="0 to leave the driver alone")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a training stage")
    parser.add_argument("--storage", help="a folder or bucket; the default is temporary")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--drive", metavar="SWEEP.yaml", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(arguments.drive, arguments.storage, arguments.seconds)
        return
    with tempfile.TemporaryDirectory(prefix="raylava-bench-") as folder:
        storage = arguments.storage or str(Path(folder) / "storage")
        result = measure(arguments.trials, arguments.kill_at or None, arguments.seconds, storage, Path(folder))
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    del result["concurrency"]  # with two CPUs, always two
    for name, value in result.items():
        sys.stdout.write(f"{name:22} {value:.2f}\n" if isinstance(value, float) else f"{name:22} {value}\n")


if __name__ == "__main__":
    main()
