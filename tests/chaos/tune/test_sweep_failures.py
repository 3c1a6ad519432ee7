"""A sweep whose driver, trial or node is killed is finished by the same command without repeating finished work."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from raylava.artifacts import Artifact
from raylava.storage import storage_path
from raylava.train.step_log import METRICS_LOG
from raylava.tune.runner import SweepRun
from raylava.tune.sweep import load_sweep
from raylava.tune.variants import TrialRecord, variants
from tests.support.processes import kill_with_children
from tests.support.sweeps import write_base_recipe, write_sweep

pytestmark = pytest.mark.usefixtures("default_ray_train_settings")

OVERRIDES = [
    "pretrain.enabled=false",
    "finetune.global_batch_size=6",
    "finetune.epochs=4",
    "finetune.checkpoint.interval_steps=5",
    "resources.workers=1",
    "evaluate=[]",
]
SEARCH = {
    "space": {"finetune.lr": {"loguniform": [1e-4, 1e-2]}, "finetune.warmup_ratio": {"uniform": [0.0, 0.3]}},
    "objective": {"loss": "min"},
    "trials": 2,
}


@pytest.fixture
def sweep_file(toy_assets: Artifact, tmp_path: Path) -> Path:
    write_base_recipe(tmp_path, toy_assets, OVERRIDES)
    return Path(write_sweep(tmp_path, "rates", search=SEARCH, max_concurrent_trials=1))


def start_sweep(sweep_file: Path) -> "subprocess.Popen[str]":
    command = ["sweep", str(sweep_file), "--storage", str(sweep_file.parent / "storage")]
    return subprocess.Popen(
        [sys.executable, "-m", "raylava.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )


def wait_for(run: "subprocess.Popen[str]", condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert run.poll() is None, run.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.5)  # conditions read recipe and study: more frequent polls would slow down the run on two cores


def load_trials(sweep_file: Path) -> list[TrialRecord]:
    sweep = load_sweep(str(sweep_file))
    assert sweep.search
    run = SweepRun(sweep, [], storage_path(sweep_file.parent / "storage"))
    return run._studies(sweep.search).load_trials(variants(sweep, [])[0])


def checkpointed_run(sweep_file: Path, trial: int) -> Path | None:
    """Return the finetuning folder of a running trial once it has a checkpoint."""
    trials = load_trials(sweep_file)
    if len(trials) <= trial or trials[trial].outcome:
        return None
    snapshots = list(sweep_file.parent.glob("storage/finetune/*/checkpoints/checkpoint_manager_snapshot.json"))
    return next((file.parent.parent for file in snapshots if b"step-" in file.read_bytes()), None)


def steps_before_first_checkpoint(folder: Path) -> list[str]:
    return (folder / METRICS_LOG).read_text().splitlines()[:5]


def find_process(run: "subprocess.Popen[str]", name: str) -> psutil.Process | None:
    """Return a process of the run's Ray cluster by a part of its command line, which Ray sets to its actor's name."""
    children = psutil.Process(run.pid).children(recursive=True)
    return next((process for process in children if name in " ".join(process.cmdline())), None)


def test_search_resumes_after_its_driver_and_then_its_trial_are_killed(sweep_file: Path) -> None:
    run = start_sweep(sweep_file)
    wait_for(run, lambda: checkpointed_run(sweep_file, 1) is not None)
    before, interrupted = load_trials(sweep_file), checkpointed_run(sweep_file, 1)
    assert interrupted is not None
    kill_with_children(run)  # the driver and its Ray cluster
    finished = {file: file.stat().st_mtime_ns for file in sweep_file.parent.glob("storage/*/*/artifact.json")}
    steps = steps_before_first_checkpoint(interrupted)

    rerun = start_sweep(sweep_file)
    wait_for(rerun, lambda: find_process(rerun, "RayTrainWorker") is not None)
    trial = find_process(rerun, "ImplicitFunc")
    assert trial is not None
    trial.kill()
    _, output = rerun.communicate(timeout=300)
    assert rerun.returncode == 0, output[-4000:]
    assert steps_before_first_checkpoint(interrupted) == steps, "the trial must resume from its checkpoint both times"

    after = load_trials(sweep_file)
    assert [trial.outcome for trial in after] == ["done"] * 2
    assert [trial.settings for trial in after] == [trial.settings for trial in before]
    assert after[0] == before[0], "a finished trial must not be repeated"
    assert {file: file.stat().st_mtime_ns for file in finished} == finished


def test_sweep_survives_the_loss_of_a_node(toy_assets: Artifact, tmp_path: Path) -> None:
    write_base_recipe(tmp_path, toy_assets, OVERRIDES)
    axes = {"rate": {"low": {"finetune.lr": 1e-4}, "high": {"finetune.lr": 1e-2}}}
    sweep_file = write_sweep(tmp_path, "rates", axes=axes)
    storage = tmp_path / "storage"
    storage.mkdir()
    script = str(Path(__file__).parent / "node_loss_driver.py")
    arguments = json.dumps({"sweep": sweep_file, "storage": str(storage)})
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    run = subprocess.run(
        [sys.executable, script, arguments], capture_output=True, text=True, timeout=400, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert (storage / "lost").exists(), "the node was not lost while a trial trained"
    assert json.loads(run.stdout.splitlines()[-1]) == [["done", None]] * 2, run.stdout[-2000:]
