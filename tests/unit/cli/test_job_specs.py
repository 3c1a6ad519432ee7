"""The content of a job: a validated recipe or sweep, and an id that depends only on the content."""

import json
from pathlib import Path

import pytest

from raylava.cli.job_specs import job_spec_for
from raylava.config.load import load_recipe
from raylava.errors import UserError
from raylava.toy.demo import recipes_folder

RECIPE = str(recipes_folder() / "llava-gemma-2b.yaml")
STORAGE = "s3://bucket/raylava"
DATA = "data=s3://bucket/data"


def test_equal_recipes_have_the_same_job_id_and_different_recipes_different_ids() -> None:
    spec = job_spec_for(RECIPE, [DATA], STORAGE)
    assert spec.id == job_spec_for(RECIPE, [DATA], STORAGE).id
    assert spec.id.startswith("raylava-llava-gemma-2b-")
    other_seed, other_storage = (
        job_spec_for(RECIPE, [DATA, "seed=1"], STORAGE),
        job_spec_for(RECIPE, [DATA], "s3://other"),
    )
    assert len({spec.id, other_seed.id, other_storage.id}) == 3


def test_job_contains_the_complete_recipe_with_its_overrides(tmp_path: Path) -> None:
    spec = job_spec_for(RECIPE, ["finetune.lr=1e-5", DATA], STORAGE)
    (tmp_path / "recipe.yaml").write_text(json.dumps(spec.files["recipe.yaml"]))
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    assert (recipe.finetune.lr, recipe.data) == (1e-5, "s3://bucket/data")
    assert spec.arguments == ("run", "recipe.yaml", "--storage", STORAGE)


def test_job_id_does_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = job_spec_for(RECIPE, ["data=''"], STORAGE).id
    monkeypatch.chdir(tmp_path)
    assert job_spec_for(RECIPE, ["data=''"], STORAGE).id == job_id


def test_folders_of_a_sweep_become_absolute_with_local_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy" / "backbones" / "gemma").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    spec = job_spec_for(str(recipes_folder() / "toy-ablations.yaml"), [], str(tmp_path / "storage"))
    gemma = spec.files["sweep.yaml"]["axes"]["language"]["large"]["model.language.name"]
    assert gemma == str(tmp_path / "toy" / "backbones" / "gemma")
    assert spec.files["recipe.yaml"]["data"] == str(tmp_path / "toy" / "corpus")


def test_job_of_a_sweep_contains_its_recipe() -> None:
    spec = job_spec_for(str(recipes_folder() / "ablations.yaml"), ["finetune.lr=1e-5", DATA], STORAGE)
    assert spec.arguments == ("sweep", "sweep.yaml", "--storage", STORAGE, "finetune.lr=1e-5", DATA)
    assert spec.files["sweep.yaml"]["recipe"] == "recipe.yaml"
    assert "extends" not in spec.files["recipe.yaml"]


def test_storage_that_nodes_cannot_reach_is_rejected() -> None:
    with pytest.raises(UserError, match="use a location that every node can reach"):
        job_spec_for(RECIPE, [DATA], "raylava-storage")


def test_local_paths_are_rejected_with_a_bucket_and_absolute_with_a_shared_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"data=data: a local path that the nodes cannot read.*data=s3://BUCKET/data"):
        job_spec_for(RECIPE, ["data=data"], STORAGE)
    (tmp_path / "mine" / "gemma").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"model\.language\.name=mine/gemma: a local path that the nodes cannot read"):
        job_spec_for(RECIPE, [DATA, "model.language={name: mine/gemma, family: gemma}"], STORAGE)
    (tmp_path / "data").mkdir()
    spec = job_spec_for(RECIPE, ["data=data"], str(tmp_path / "storage"))
    assert spec.files["recipe.yaml"]["data"] == str(tmp_path / "data")
