"""What travels with a job: a validated file and this raylava, under a name that is the same for the same work."""

import json
import shlex
from pathlib import Path

import pytest

from raylava.cli import main
from raylava.cluster.jobs import Jobs, entrypoint, work_of
from raylava.demo import recipes_folder
from raylava.errors import UserError
from raylava.recipe_file import load_recipe

RECIPE = str(recipes_folder() / "llava-gemma-2b.yaml")
STORAGE = "s3://bucket/raylava"


def test_the_same_recipe_is_the_same_job_and_another_is_another() -> None:
    one = work_of(RECIPE, [], STORAGE)
    assert one.id == work_of(RECIPE, [], STORAGE).id
    assert one.id.startswith("raylava-llava-gemma-2b-")
    assert len({one.id, work_of(RECIPE, ["seed=1"], STORAGE).id, work_of(RECIPE, [], "s3://other").id}) == 3


def test_what_travels_is_the_whole_recipe_with_its_overrides(tmp_path: Path) -> None:
    work = work_of(RECIPE, ["finetune.lr=1e-5", "data=s3://bucket/data"], STORAGE)
    (tmp_path / "recipe.yaml").write_text(json.dumps(work.files["recipe.yaml"]))
    travelled = load_recipe(str(tmp_path / "recipe.yaml"))
    assert (travelled.finetune.lr, travelled.data) == (1e-5, "s3://bucket/data")
    assert work.arguments == ("run", "recipe.yaml", "--storage", STORAGE)


def test_a_sweep_travels_with_its_recipe() -> None:
    work = work_of(str(recipes_folder() / "ablations.yaml"), ["finetune.lr=1e-5"], STORAGE)
    assert work.arguments == ("sweep", "sweep.yaml", "--storage", STORAGE, "finetune.lr=1e-5")
    assert work.files["sweep.yaml"]["recipe"] == "recipe.yaml"
    assert "extends" not in work.files["recipe.yaml"]


def test_a_storage_that_other_machines_cannot_reach_is_told() -> None:
    with pytest.raises(UserError, match="name a place that every node reaches"):
        work_of(RECIPE, [], "raylava-storage")


def test_a_password_does_not_travel() -> None:
    with pytest.raises(UserError, match=r"tracking\.mlflow holds a password") as told:
        work_of(RECIPE, ["tracking.mlflow=postgresql://me:planted-secret@host/db"], STORAGE)
    assert "planted-secret" not in str(told.value)
    with pytest.raises(UserError, match=r"arguments\.3 holds a password"):
        work_of(RECIPE, [], "s3://key:planted-secret@bucket/raylava")


def test_a_shell_reads_what_is_submitted_as_it_was_meant() -> None:
    work = work_of(str(recipes_folder() / "ablations.yaml"), ["name=$(touch owned)"], "/a place/of; mine")
    assert shlex.split(entrypoint(work.arguments))[3:] == list(work.arguments)


def test_a_cluster_that_is_not_named_or_not_there_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert main(["submit", RECIPE, "--storage", STORAGE]) == 2
    assert "no cluster is named; give --address" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(UserError, match=r"--address http://127\.0\.0\.1:1: "):
        Jobs("http://127.0.0.1:1")
