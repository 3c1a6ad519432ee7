"""Jobs on an autoscaling cluster on one machine: submission, stopping, and storage in a bucket."""

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from raylava.artifacts import Artifact
from raylava.cluster.local_cluster import LocalCluster
from raylava.storage import cache_folder, storage_path
from raylava.toy.demo import recipes_folder
from tests.conftest import SECRET
from tests.support.local_cluster import (
    ROOT,
    output_of,
    running_cluster,
    start_python,
    start_raylava,
    two_worker_recipe,
    write_recipe,
)


@pytest.fixture(scope="module")
def file(toy_assets: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(two_worker_recipe(toy_assets), tmp_path_factory.mktemp("recipe"))


def query_dashboard(cluster: LocalCluster, path: str) -> dict[str, Any]:
    """Query what Ray's dashboard shows."""
    token = (Path(cluster.folder) / "auth_token").read_text()
    request = Request(f"{cluster.address}/{path}", headers={"Authorization": f"Bearer {token}"})
    with urlopen(request, timeout=30) as response:
        return dict(json.load(response))


# `s3` comes first: the cluster's processes inherit the environment that gives access to the bucket.
@pytest.fixture
def cluster(s3: str) -> Iterator[LocalCluster]:
    with running_cluster() as cluster:
        yield cluster


def test_recipe_submitted_twice_is_one_job_that_can_be_stopped(
    cluster: LocalCluster, toy_assets: Artifact, file: Path, tmp_path: Path
) -> None:
    arguments = [str(file), "--storage", str(tmp_path)]
    first = output_of(start_raylava(cluster, "submit", *arguments, "--detach"))
    second = output_of(start_raylava(cluster, "submit", *arguments, "--detach"))
    assert "submitted" in first
    assert "is already running" in second
    assert ": stopped" in output_of(start_raylava(cluster, "stop", *arguments))
    assert "no such job is running" in output_of(start_raylava(cluster, "stop", *arguments))
    (tmp_path / "toy").symlink_to(toy_assets.path.path, target_is_directory=True)  # the shipped recipe refers to ./toy
    shipped = [str(recipes_folder() / "toy.yaml"), "resources.workers=3", "--storage", str(tmp_path)]
    output = output_of(start_raylava(cluster, "check", *shipped, "--address", cluster.address, cwd=tmp_path))
    assert "3 × {CPU: 1} on raylava.io/role=train" in " ".join(output.split())
    too_large = [*shipped, "resources.workers=9", "--address", cluster.address]
    check = start_raylava(cluster, "check", *too_large, cwd=tmp_path)
    output = " ".join(check.communicate(timeout=120)[0].split())
    assert check.returncode == 2
    assert "pretrain and finetune can never start there" in output
    assert "raise max_workers, or lower resources.workers" in output
    submit = start_raylava(cluster, "submit", *arguments, "resources.workers=9")
    output = submit.communicate(timeout=120)[0]
    assert submit.returncode == 1
    assert "finetune can never start on this cluster" in " ".join(output.split())


def test_nodes_without_a_shared_disk_use_a_bucket_and_write_no_secret(
    cluster: LocalCluster, file: Path, s3: str, tmp_path: Path
) -> None:
    storage = f"{s3}/local-cluster"
    overrides = ["finetune.max_steps=3", "evaluate=[]"]
    job = ["python", "jobs/train.py", "--recipe", "jobs/recipes/submitted.yaml", "--storage", storage, *overrides]
    folder = tmp_path / "working"
    for name in ("jobs", "raylava"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "jobs" / "recipes" / "submitted.yaml").write_text(file.read_text())
    submit = ["-m", "ray.scripts.scripts", "job", "submit", "--submission-id", "by-ray", "--working-dir", str(folder)]
    job_output = output_of(start_python(cluster, *submit, "--", *job))
    (model,) = (storage_path(storage) / "finetune").children()
    assert (model / "artifact.json").exists()
    runs = query_dashboard(cluster, "api/train/v2/runs/v1")["train_runs"]
    assert [(run["name"], run["status"]) for run in runs] == [(f"finetune/{model.name}/checkpoints", "FINISHED")]
    (dataset,) = query_dashboard(cluster, f"api/data/datasets/{runs[0]['job_id']}")["datasets"]
    assert dataset["state"] == "FINISHED"
    job_list = output_of(start_python(cluster, "-m", "ray.scripts.scripts", "job", "list"))
    for text in (job_output, job_list):
        assert SECRET not in text
    for name, _ in storage_path(storage).walk_files():
        assert SECRET.encode() not in (storage_path(storage) / name).read_bytes()
    logs = [log for log in (*Path(cluster.folder).rglob("logs/**/*"), *cache_folder().rglob("logs/*")) if log.is_file()]
    assert any("job-driver" in log.name for log in logs)
    assert any(log.name.startswith("run-") for log in logs)
    for log in logs:
        with suppress(FileNotFoundError):  # Ray rotates its logs meanwhile
            assert SECRET.encode() not in log.read_bytes(), log
    status = output_of(start_raylava(cluster, "status", "--storage", storage, "--json"))
    states = {artifact["stage"]: artifact["state"] for artifact in json.loads(status.splitlines()[-1])["artifacts"]}
    assert states == {"prepare": "complete", "finetune": "complete"}
