"""A sweep whose driver, trial or node is killed: the same command finishes it, and what was done is not done again."""

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
from raylava.toy.demo import toy_recipe
from raylava.train.metrics_logger import METRICS
from raylava.tune.records import TrialRecord
from raylava.tune.runner import SweepRun
from raylava.tune.sweep import load_sweep
from raylava.tune.variants import variants
from tests.processes import kill_with_children

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_looks_as_always")]

SMALL = [
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
    "trials": 3,
}


@pytest.fixture
def sweep_file(toy_assets: Artifact, tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(json.dumps(toy_recipe(toy_assets.path, SMALL).model_dump(mode="json")))
    sweep = {"name": "rates", "recipe": "base.yaml", "search": SEARCH, "max_concurrent_trials": 1}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    return tmp_path / "sweep.yaml"


def start(sweep_file: Path) -> "subprocess.Popen[str]":
    command = ["sweep", str(sweep_file), "--storage", str(sweep_file.parent / "storage")]
    return subprocess.Popen(
        [sys.executable, "-m", "raylava.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )


def wait_for(run: "subprocess.Popen[str]", once: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not once():
        assert run.poll() is None, run.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.5)  # what is asked here reads recipe and study: not more often, beside a run on two cores


def tried(sweep_file: Path) -> list[TrialRecord]:
    sweep = load_sweep(str(sweep_file))
    assert sweep.search
    run = SweepRun(sweep, [], storage_path(sweep_file.parent / "storage"))
    return run._studies(sweep.search).look(variants(sweep, [])[0])


def under_way(sweep_file: Path, trial: int) -> Path | None:
    """The finetuning spec of the trial that runs, once it has a checkpoint."""
    known = tried(sweep_file)
    if len(known) <= trial or known[trial].ended:
        return None
    found = list(sweep_file.parent.glob("storage/finetune/*/checkpoints/checkpoint_manager_snapshot.json"))
    return next((one.parent.parent for one in found if b"step-" in one.read_bytes()), None)


def lines_before_the_first_checkpoint(spec: Path) -> list[str]:
    return (spec / METRICS).read_text().splitlines()[:5]


def trial_process(run: "subprocess.Popen[str]") -> psutil.Process | None:
    children = psutil.Process(run.pid).children(recursive=True)
    return next((one for one in children if "ImplicitFunc" in " ".join(one.cmdline())), None)


def test_a_search_whose_driver_and_then_whose_trial_is_killed_ends_as_if_neither_had_been(sweep_file: Path) -> None:
    run = start(sweep_file)
    wait_for(run, lambda: under_way(sweep_file, 1) is not None)
    before, spec = tried(sweep_file), under_way(sweep_file, 1)
    assert spec is not None
    kill_with_children(run)  # driver and cluster alike
    finished = {file: file.stat().st_mtime_ns for file in sweep_file.parent.glob("storage/*/*/artifact.json")}
    steps = lines_before_the_first_checkpoint(spec)

    again = start(sweep_file)
    wait_for(again, lambda: (sweep_file.parent / f"storage/finetune/{spec.name}/artifact.json").exists())
    assert lines_before_the_first_checkpoint(spec) == steps, "it went on from its checkpoint"
    wait_for(again, lambda: under_way(sweep_file, 2) is not None)
    last = under_way(sweep_file, 2)
    assert last is not None
    steps = lines_before_the_first_checkpoint(last)
    process = trial_process(again)
    assert process is not None
    process.kill()
    _, told = again.communicate(timeout=300)
    assert again.returncode == 0, told[-4000:]
    assert lines_before_the_first_checkpoint(last) == steps, "Tune began it again, and it went on from its checkpoint"

    after = tried(sweep_file)
    assert [one.ended for one in after] == ["done"] * 3
    assert [one.settings for one in after[:2]] == [one.settings for one in before]
    assert after[0] == before[0], "what was finished was not repeated"
    assert len({one.settings["finetune.lr"] for one in after}) == 3
    assert {file: file.stat().st_mtime_ns for file in finished} == finished


def test_a_sweep_survives_the_loss_of_a_node(toy_assets: Artifact, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(json.dumps(toy_recipe(toy_assets.path, SMALL).model_dump(mode="json")))
    axes = {"rate": {"low": {"finetune.lr": 1e-4}, "high": {"finetune.lr": 1e-2}}}
    sweep = {"name": "rates", "recipe": "base.yaml", "axes": axes}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    storage = tmp_path / "storage"
    storage.mkdir()
    script = str(Path(__file__).parent / "driver.py")
    given = json.dumps({"sweep": str(tmp_path / "sweep.yaml"), "storage": str(storage)})
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    run = subprocess.run(
        [sys.executable, script, given], capture_output=True, text=True, timeout=400, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert (storage / "lost").exists(), "the node was not lost while a trial trained"
    assert json.loads(run.stdout.splitlines()[-1]) == [["done", None]] * 2, run.stdout[-2000:]
