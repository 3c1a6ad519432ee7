"""A recipe on an autoscaling cluster: real job server, autoscaler v2, tokens; nodes come, die and go, the result is
that of a run in peace. One machine plays them all.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from raylava.artifacts import Artifact
from raylava.cluster import local_cluster
from raylava.cluster.local_cluster import LocalCluster
from raylava.config.recipe import Recipe
from raylava.console import Console
from raylava.pipeline.stages import run
from raylava.storage import StoragePath, cache_folder, storage_path
from raylava.toy.demo import recipes_folder, toy_recipe
from raylava.train.spec import CHECKPOINTS, SNAPSHOT
from raylava.train.step_log import STEP_LOG
from tests.conftest import SECRET

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_looks_as_always")]

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster" / "laptop.yaml"


@pytest.fixture(scope="module")
def recipe(toy_assets: Artifact) -> Recipe:
    """Two workers, 48 steps of finetuning, a checkpoint after every eighth. No pretraining: a start takes its time."""
    settings = ["resources.workers=2", "resources.cpus_per_worker=1", "evaluate.0.baselines=[]"]
    training = ["finetune.global_batch_size=8", "finetune.epochs=8", "finetune.checkpoint={interval_steps: 8}"]
    return toy_recipe(toy_assets.path, [*settings, *training, "pretrain.enabled=false"])


@pytest.fixture(scope="module")
def file(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_dump(mode="json")))
    return file


@pytest.fixture(scope="module")
def peaceful(recipe: Recipe, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> StoragePath:
    """The run that nothing befell, without a cluster."""
    storage = tmp_path_factory.mktemp("peaceful")
    with (storage / "console.txt").open("w") as stream:
        run(recipe, storage_path(storage), Console(stream))
    return storage_path(storage)


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    started = local_cluster.start(CLUSTER)
    yield started
    started.stop()
    assert not list(started.processes()), "it leaves nothing behind"


def command(cluster: LocalCluster, *arguments: str, cwd: Path = ROOT) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=environment | cluster.environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )


def raylava(cluster: LocalCluster, *arguments: str, cwd: Path = ROOT) -> "subprocess.Popen[str]":
    return command(cluster, "-m", "raylava.cli", *arguments, cwd=cwd)


def finish(started: "subprocess.Popen[str]") -> str:
    told, _ = started.communicate(timeout=400)
    assert started.returncode == 0, told[-5000:]
    return told


def nodes(cluster: LocalCluster) -> dict[int, str]:
    """Process of each worker node's raylet → node type."""
    found = {}
    for process in cluster.processes():
        with suppress(psutil.NoSuchProcess):
            if process.name() == "raylet" and "RAY_NODE_TYPE_NAME" in process.environ():
                found[process.pid] = process.environ()["RAY_NODE_TYPE_NAME"]
    return found


def kill_node(cluster: LocalCluster, raylet: int) -> None:
    """SIGKILL a node and all that runs on it, as when a cloud matches_filters a machine."""
    name = psutil.Process(raylet).environ()["RAY_CLOUD_INSTANCE_ID"]
    for process in cluster.processes():
        with suppress(psutil.NoSuchProcess):
            if process.environ().get("RAY_CLOUD_INSTANCE_ID") == name:
                process.kill()


def wait_for(once: Callable[[], bool], started: "subprocess.Popen[str] | None" = None, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not once():
        assert started is None or started.poll() is None, started.communicate()[0][-5000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def checkpoints(storage: StoragePath) -> int:
    """Whole checkpoints of finetunings that are under way."""
    snapshots = [one / CHECKPOINTS / SNAPSHOT for one in (storage / "finetune").children()]
    return sum(b"step-" in one.read_bytes() for one in snapshots if one.exists())


def proof(storage: StoragePath) -> tuple[list[tuple[Any, ...]], bytes]:
    """What a finetuning computed: each step's samples and loss, and the weights."""
    (folder,) = (storage / "finetune").children()
    lines = [json.loads(line) for line in (folder / STEP_LOG).read_bytes().splitlines()]
    steps = [(line["step"], line["samples_sha256"], line["loss"]) for line in lines]
    return steps, (folder / "model.safetensors").read_bytes()


def test_nodes_come_for_the_stages_that_want_them_one_is_lost_and_the_result_is_the_same(
    cluster: LocalCluster, file: Path, peaceful: StoragePath, tmp_path: Path
) -> None:
    storage = storage_path(tmp_path)
    assert nodes(cluster) == {}, "a cluster without work is its head"
    started = raylava(cluster, "submit", str(file), "--storage", str(tmp_path))
    wait_for(lambda: "cpu_spot" in nodes(cluster).values(), started)
    while not list(tmp_path.glob("prepare/*/artifact.json")):
        assert started.poll() is None
        assert "gpu_spot" not in nodes(cluster).values() or list(tmp_path.glob("prepare/*/artifact.json")), (
            "no need yet"
        )
    wait_for(lambda: Counter(nodes(cluster).values())["gpu_spot"] == 2, started)
    wait_for(lambda: checkpoints(storage) > 0, started)
    lost = next(raylet for raylet, kind in nodes(cluster).items() if kind == "gpu_spot")
    kill_node(cluster, lost)
    told = finish(started)
    assert "going on from the last checkpoint" in told
    assert proof(storage) == proof(peaceful)
    assert lost not in nodes(cluster)
    wait_for(lambda: nodes(cluster) == {})
    again = finish(raylava(cluster, "submit", str(file), "--storage", str(tmp_path)))
    assert again.count(" found ") == again.count("✓") == 3, "all is there already"


def test_a_recipe_submitted_twice_is_one_job_that_can_be_stopped(
    cluster: LocalCluster, toy_assets: Artifact, file: Path, tmp_path: Path
) -> None:
    given = [str(file), "--storage", str(tmp_path)]
    first = finish(raylava(cluster, "submit", *given, "--detach"))
    second = finish(raylava(cluster, "submit", *given, "--detach"))
    assert "submitted" in first
    assert "runs already" in second
    assert ": stopped" in finish(raylava(cluster, "stop", *given))
    assert "no such job runs" in finish(raylava(cluster, "stop", *given))
    (tmp_path / "toy").symlink_to(toy_assets.path.path, target_is_directory=True)  # the shipped recipe names ./micro
    shipped = [str(recipes_folder() / "toy.yaml"), "resources.workers=3", "--storage", str(tmp_path)]
    told = finish(raylava(cluster, "check", *shipped, "--address", cluster.address, cwd=tmp_path))
    assert "3 × {CPU: 1} on raylava.io/role=train" in " ".join(told.split())
    no = raylava(cluster, "check", *shipped, "resources.workers=9", "--address", cluster.address, cwd=tmp_path)
    told = no.communicate(timeout=120)[0]
    assert no.returncode == 2
    told = " ".join(told.split())
    assert "pretrain and finetune can never start there" in told
    assert "raise max_workers, or lower resources.workers" in told
    never = raylava(cluster, "submit", *given, "resources.workers=9")
    told = never.communicate(timeout=120)[0]
    assert never.returncode == 1
    assert "finetune can never start on this cluster" in " ".join(told.split())


def test_nodes_that_share_no_disk_meet_in_a_bucket_and_no_secret_gets_into_it(
    cluster: LocalCluster, file: Path, s3: str, tmp_path: Path
) -> None:
    storage = f"{s3}/laptop"
    short = ["finetune.max_steps=3", "evaluate=[]"]
    job = ["python", "jobs/train.py", "--recipe", "jobs/recipes/submitted.yaml", "--storage", storage, *short]
    folder = tmp_path / "working"
    for name in ("jobs", "raylava"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "jobs" / "recipes" / "submitted.yaml").write_text(file.read_text())
    submit = ["-m", "ray.scripts.scripts", "job", "submit", "--submission-id", "by-ray", "--working-dir", str(folder)]
    told = finish(command(cluster, *submit, "--", *job))
    (model,) = (storage_path(storage) / "finetune").children()
    assert (model / "artifact.json").exists()
    listed = finish(command(cluster, "-m", "ray.scripts.scripts", "job", "list"))
    for text in (told, listed):
        assert SECRET not in text
    for name, _ in storage_path(storage).walk_files():
        assert SECRET.encode() not in (storage_path(storage) / name).read_bytes()
    logs = [log for log in (*Path(cluster.folder).rglob("logs/**/*"), *cache_folder().rglob("logs/*")) if log.is_file()]
    assert any("job-driver" in log.name for log in logs)
    assert any(log.name.startswith("run-") for log in logs)
    for log in logs:
        with suppress(FileNotFoundError):  # Ray moves its logs about while we read
            assert SECRET.encode() not in log.read_bytes(), log
    status = finish(raylava(cluster, "status", "--storage", storage, "--json"))
    states = {one["stage"]: one["state"] for one in json.loads(status.splitlines()[-1])["artifacts"]}
    assert states == {"prepare": "made", "finetune": "made"}


def test_after_the_head_is_lost_the_recipe_submitted_anew_goes_on_from_its_last_checkpoint(
    file: Path, peaceful: StoragePath, tmp_path: Path
) -> None:
    storage = storage_path(tmp_path)
    first = local_cluster.start(CLUSTER)
    try:
        started = raylava(first, "submit", str(file), "--storage", str(tmp_path))
        wait_for(lambda: checkpoints(storage) > 0, started)
        gcs = next(process for process in first.processes() if process.name() == "gcs_server")
        gcs.kill()
        killed = time.time()
        started.communicate(timeout=120)
        assert started.returncode != 0
    finally:
        first.stop()
    second = local_cluster.start(CLUSTER)
    try:
        finish(raylava(second, "submit", str(file), "--storage", str(tmp_path)))
    finally:
        second.stop()
    assert proof(storage) == proof(peaceful)
    (folder,) = (storage / "finetune").children()
    lines = [json.loads(line) for line in (folder / STEP_LOG).read_bytes().splitlines()]
    assert any(line["time"] < killed for line in lines), "steps before the loss were not made again"
