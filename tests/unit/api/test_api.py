"""The names of the Python API: typed, documented, loaded at first use, and those that the commands call."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import raylava
from raylava.artifacts import Artifact


def test_importing_raylava_loads_neither_ray_nor_torch() -> None:
    script = (
        "import sys, raylava; raylava.UserError; raylava.load_recipe\n"
        "assert not {'ray', 'torch', 'transformers', 'pyarrow'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", raylava.__all__)
def test_every_public_name_exists_with_a_docstring_and_types(name: str) -> None:
    value = getattr(raylava, name)
    assert inspect.getdoc(value)
    members = [value] if inspect.isfunction(value) else [
        member for key, member in inspect.getmembers(value, inspect.isfunction) if not key.startswith("_")
    ]  # fmt: skip
    for member in members:
        parameters = inspect.signature(member).parameters.values()
        assert all(
            parameter.annotation is not inspect.Parameter.empty for parameter in parameters if parameter.name != "self"
        )


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        raylava.trian  # noqa: B018


def test_functions_stay_functions_after_their_packages_are_imported() -> None:
    script = "import inspect, raylava, raylava.evaluation.loading; assert inspect.isfunction(raylava.evaluate)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_overrides_apply_to_a_file_or_name_and_not_to_a_loaded_recipe(tmp_path: Path) -> None:
    recipe = raylava.load_recipe("toy", ["seed=3"])
    assert recipe.seed == 3
    with pytest.raises(raylava.UserError, match="pass them to load_recipe"):
        raylava.run(recipe, ["seed=4"], storage=str(tmp_path))


def test_run_names_its_stages_when_one_is_missing(toy_assets: Artifact) -> None:
    run = raylava.Run(raylava.load_recipe("toy"), {"prepare instruction": toy_assets})
    with pytest.raises(
        raylava.UserError, match="finetune: not a stage of this run; choose one of: prepare instruction"
    ):
        run.model  # noqa: B018
    assert run.scores == {}
    assert run.summary()["prepare instruction"]["fingerprint"] == toy_assets.fingerprint


def test_open_blocks_refuses_a_folder_without_a_corpus(tmp_path: Path) -> None:
    with pytest.raises(raylava.UserError):
        raylava.open_blocks(str(tmp_path))


def test_model_answers_about_images_and_files_and_keeps_a_conversation(untrained_llava: Path, tmp_path: Path) -> None:
    model = raylava.load_model(str(untrained_llava))
    image = Image.new("L", (96, 96), 120)
    image.save(tmp_path / "gray.png")
    by_file = model.answer("What is it?", tmp_path / "gray.png", max_new_tokens=3)
    assert by_file == model.answer("What is it?", image, max_new_tokens=3)
    conversation = model.chat(max_new_tokens=3)
    first = conversation.ask("What is it?", image)
    second = conversation.ask("Sure?")
    assert conversation.history == [("What is it?", first), ("Sure?", second)]
    with pytest.raises(raylava.UserError, match=r"image .*none\.png"):
        model.answer("What?", tmp_path / "none.png")
