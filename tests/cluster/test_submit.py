"""What travels with a job: a validated file and this raylava, under a name that is the same for the same work."""

import json
import re
import shlex
from pathlib import Path

import pytest

from raylava.cli import main
from raylava.cluster.jobs import JobClient, check_no_secret, entrypoint, work_of
from raylava.config.load import load_recipe
from raylava.errors import UserError
from raylava.toy.demo import recipes_folder

RECIPE = str(recipes_folder() / "llava-gemma-2b.yaml")
STORAGE = "s3://bucket/raylava"
DATA = "data=s3://bucket/data"


def test_the_same_recipe_is_the_same_job_and_another_is_another() -> None:
    one = work_of(RECIPE, [DATA], STORAGE)
    assert one.id == work_of(RECIPE, [DATA], STORAGE).id
    assert one.id.startswith("raylava-llava-gemma-2b-")
    assert len({one.id, work_of(RECIPE, [DATA, "seed=1"], STORAGE).id, work_of(RECIPE, [DATA], "s3://other").id}) == 3


def test_what_travels_is_the_whole_recipe_with_its_overrides(tmp_path: Path) -> None:
    work = work_of(RECIPE, ["finetune.lr=1e-5", DATA], STORAGE)
    (tmp_path / "recipe.yaml").write_text(json.dumps(work.files["recipe.yaml"]))
    travelled = load_recipe(str(tmp_path / "recipe.yaml"))
    assert (travelled.finetune.lr, travelled.data) == (1e-5, "s3://bucket/data")
    assert work.arguments == ("run", "recipe.yaml", "--storage", STORAGE)


def test_where_it_is_submitted_from_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = work_of(RECIPE, ["data=''"], STORAGE).id
    monkeypatch.chdir(tmp_path)
    assert work_of(RECIPE, ["data=''"], STORAGE).id == here


def test_the_folders_that_a_sweep_names_travel_by_their_absolute_path_where_a_disk_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy" / "backbones" / "gemma").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    work = work_of(str(recipes_folder() / "toy-ablations.yaml"), [], str(tmp_path / "storage"))
    gemma = work.files["sweep.yaml"]["axes"]["language"]["large"]["model.language.name"]
    assert gemma == str(tmp_path / "toy" / "backbones" / "gemma")
    assert work.files["recipe.yaml"]["data"] == str(tmp_path / "toy" / "corpus")


def test_a_sweep_travels_with_its_recipe() -> None:
    work = work_of(str(recipes_folder() / "ablations.yaml"), ["finetune.lr=1e-5", DATA], STORAGE)
    assert work.arguments == ("sweep", "sweep.yaml", "--storage", STORAGE, "finetune.lr=1e-5", DATA)
    assert work.files["sweep.yaml"]["recipe"] == "recipe.yaml"
    assert "extends" not in work.files["recipe.yaml"]


def test_a_storage_that_other_machines_cannot_reach_is_told() -> None:
    with pytest.raises(UserError, match="name a place that every node reaches"):
        work_of(RECIPE, [DATA], "raylava-storage")


def test_a_place_in_this_folder_means_nothing_to_nodes_that_share_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"data=data: a place in this machine's folder.*data=s3://BUCKET/data"):
        work_of(RECIPE, ["data=data"], STORAGE)
    (tmp_path / "mine" / "gemma").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"model\.language\.name=mine/gemma: a place in this machine's folder"):
        work_of(RECIPE, [DATA, "model.language={name: mine/gemma, family: gemma}"], STORAGE)
    (tmp_path / "data").mkdir()
    travelling = work_of(RECIPE, ["data=data"], str(tmp_path / "storage"))
    assert travelling.files["recipe.yaml"]["data"] == str(tmp_path / "data"), "with a shared disk it is one place"


@pytest.mark.parametrize(
    ("overrides", "storage", "where"),
    [
        (["tracking.mlflow=postgresql://me:planted@host/db"], STORAGE, "recipe.yaml.tracking.mlflow"),
        (["tracking.mlflow=https://host/?api_token=planted"], STORAGE, "recipe.yaml.tracking.mlflow"),
        ([], "s3://key:planted@bucket/raylava", "arguments.3"),
        ([], "s3://bucket/raylava?access_key=AK&secret_key=planted", "arguments.3"),
    ],
)
def test_a_password_does_not_travel(overrides: list[str], storage: str, where: str) -> None:
    with pytest.raises(UserError, match=f"{re.escape(where)} holds a password") as told:
        check_no_secret(work_of(RECIPE, [DATA, *overrides], storage))
    assert "planted" not in str(told.value)
    check_no_secret(work_of(RECIPE, [DATA, "name=name"], STORAGE))


def test_a_shell_reads_what_is_submitted_as_it_was_meant() -> None:
    work = work_of(str(recipes_folder() / "ablations.yaml"), ["data=$(touch owned)"], "/a place/of; mine")
    assert shlex.split(entrypoint(work.arguments))[3:] == list(work.arguments)


def test_a_cluster_that_is_not_named_or_not_there_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert main(["submit", RECIPE, DATA, "--storage", STORAGE]) == 2
    assert "no cluster is named; give --address" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(UserError, match=r"--address http://127\.0\.0\.1:1: "):
        JobClient("http://127.0.0.1:1")
