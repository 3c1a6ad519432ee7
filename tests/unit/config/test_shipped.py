"""A shipped recipe's name works wherever a file does, and a copy of one works in any folder."""

import json
from pathlib import Path

import pytest

from raylava.cli import main
from raylava.cli.job_specs import job_spec_for
from raylava.config.load import load_recipe
from raylava.config.shipped import locate, recipes_folder, shipped_recipes
from raylava.errors import UserError
from raylava.tune.sweep import load_sweep
from raylava.tune.variants import variants

RECIPES = [recipe.name for recipe in shipped_recipes() if recipe.kind == "recipe"]
SWEEPS = [recipe.name for recipe in shipped_recipes() if recipe.kind == "sweep"]
S3 = ("data=s3://bucket/llava", "s3://bucket/raylava")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def file_of(name: str) -> str:
    return str(recipes_folder() / f"{name}.yaml")


def test_every_shipped_file_is_listed_with_a_sentence_that_describes_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    listed = {recipe["name"]: recipe for recipe in json.loads(capfd.readouterr().out)["recipes"]}
    assert set(listed) == {file.stem for file in recipes_folder().iterdir()}
    assert {listed[name]["kind"] for name in ("toy-ablations", "learning-rates")} == {"sweep"}
    assert {listed[name]["kind"] for name in ("toy", "llava-gemma-7b")} == {"recipe"}
    assert not [name for name, recipe in listed.items() if not recipe["description"].endswith(".")]
    assert main(["recipes"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(listed)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_names_work_wherever_a_file_does(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert load_recipe(name, ["seed=3"]) == load_recipe(file_of(name), ["seed=3"])
    Path("child.yaml").write_text(f"extends: {name}\nname: child\n")
    assert load_recipe("child.yaml") == load_recipe(name).model_copy(update={"name": "child"})
    assert job_spec_for(name, [S3[0]], S3[1]).id == job_spec_for(file_of(name), [S3[0]], S3[1]).id


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep_names_work_wherever_a_file_does(name: str) -> None:
    assert variants(load_sweep(name), []) == variants(load_sweep(file_of(name)), [])


def test_sweep_may_name_its_recipe() -> None:
    Path("sweep.yaml").write_text("name: mine\nrecipe: toy\nseeds: [0, 1]\n")
    assert [variant.recipe.seed for variant in variants(load_sweep("sweep.yaml"), [])] == [0, 1]
    spec = job_spec_for("sweep.yaml", [], str(Path("storage").absolute()))
    assert spec.files["recipe.yaml"]["name"] == "toy"


def test_job_of_a_named_sweep_carries_its_recipe_and_needs_no_name_on_the_cluster() -> None:
    spec = job_spec_for("ablations", [S3[0]], S3[1])
    assert spec == job_spec_for(file_of("ablations"), [S3[0]], S3[1])
    assert spec.arguments[:2] == ("sweep", "sweep.yaml")
    assert spec.files["sweep.yaml"]["recipe"] == "recipe.yaml"
    assert "extends" not in spec.files["recipe.yaml"]


def test_relative_paths_of_a_named_recipe_start_at_the_current_folder(empty_folder: Path) -> None:
    spec = job_spec_for("toy", [], str(empty_folder / "storage"))
    assert spec.files["recipe.yaml"]["data"] == str(empty_folder / "toy" / "corpus")


def test_commands_accept_names(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "llava-gemma-2b"]) == 0
    assert main(["estimate", "llava-gemma-2b", "--nodes", "1", "--gpus-per-node", "8", "--gpu", "h100", "--json"]) == 0
    valid, estimate = capfd.readouterr().out.splitlines()
    assert valid == "llava-gemma-2b: valid"
    assert json.loads(estimate)["best"] == "1 × 8 H100"


def test_folder_of_that_name_does_not_hide_a_recipe_but_a_file_does() -> None:
    Path("toy").mkdir()
    assert locate("toy") == Path(file_of("toy"))
    Path("nlvr").write_text("extends: toy\nname: mine\n")
    assert load_recipe("nlvr").name == "mine"


@pytest.mark.parametrize("reference", ["./toy", "toy.yaml", "toy.yml"])
def test_paths_are_never_names(reference: str) -> None:
    with pytest.raises(UserError, match="cannot read the recipe"):
        load_recipe(reference)


def test_unknown_name_suggests_the_closest_ones() -> None:
    with pytest.raises(UserError, match="lava-gema-2b: neither a file nor a shipped recipe; did you mean llava-gemma"):
        load_recipe("lava-gema-2b")
    Path("child.yaml").write_text("extends: tyo\nname: child\n")
    with pytest.raises(UserError, match="tyo: neither a file nor a shipped recipe; did you mean toy"):
        load_recipe("child.yaml")


@pytest.mark.parametrize("name", [*RECIPES, *SWEEPS])
def test_copy_works_from_any_folder(name: str, tmp_path: Path) -> None:
    copy = str(tmp_path / "mine.yaml")
    assert main(["recipes", "copy", name, copy]) == 0
    if name in RECIPES:
        assert load_recipe(copy) == load_recipe(name)
    else:
        assert variants(load_sweep(copy), []) == variants(load_sweep(name), [])


def test_copy_refuses_to_overwrite(capfd: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("mine")
    assert main(["recipes", "copy", "toy", "mine.yaml"]) == 2
    assert capfd.readouterr().err == "error: mine.yaml: exists already; name a new file\n"
    assert Path("mine.yaml").read_text() == "mine"


def test_show_prints_the_file(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "nlvr"]) == 0
    assert capfd.readouterr().out == Path(file_of("nlvr")).read_text()
