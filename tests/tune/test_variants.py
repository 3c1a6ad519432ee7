"""A sweep's file becomes variants: every combination that is not excluded, each a valid recipe; or a line says why."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylava.config.load import load_recipe
from raylava.errors import UserError
from raylava.toy.demo import recipes_folder
from raylava.tune.sweep import Sweep, load_sweep
from raylava.tune.variants import variants

SPACE = {"finetune.lr": {"loguniform": [1e-6, 1e-4]}}
LOSS = {"loss": "min"}
AXES = {
    "connector": {"pretrained": {"pretrain.enabled": True}, "random": {"pretrain.enabled": False}},
    "rate": {"low": {"finetune.lr": 1e-5}, "high": {"finetune.lr": 1e-3}},
}


def written(folder: Path, **settings: Any) -> str:
    sweep = {"name": "test", "recipe": str(recipes_folder() / "llava-gemma-2b.yaml")} | settings
    (folder / "sweep.yaml").write_text(json.dumps(sweep))  # JSON is YAML
    return str(folder / "sweep.yaml")


def test_axes_and_seeds_are_crossed_and_each_variant_is_the_recipe_with_its_settings(tmp_path: Path) -> None:
    found = variants(load_sweep(written(tmp_path, axes=AXES, seeds=[0, 1], set={"finetune.epochs": 2})), [])
    assert [one.name for one in found][:3] == [
        "connector=pretrained rate=low seed=0",
        "connector=pretrained rate=low seed=1",
        "connector=pretrained rate=high seed=0",
    ]
    last = found[-1].recipe
    assert (last.pretrain.enabled, last.finetune.lr, last.seed, last.finetune.epochs) == (False, 1e-3, 1, 2)
    assert len(found) == 8


def test_the_papers_ablations_are_its_eight_recipes_with_three_seeds_each() -> None:
    found = variants(load_sweep(str(recipes_folder() / "ablations.yaml")), [])
    assert len(found) == 24
    for one in found:
        parts = ["llava-gemma", one.levels["language"], *(["dinov2"] if one.levels["vision"] == "dinov2" else [])]
        name = "-".join([*parts, *(["no-pretrain"] if one.levels["connector"] == "random" else [])])
        row = load_recipe(str(recipes_folder() / f"{name}.yaml"), [f"seed={one.seed}"])
        assert one.recipe.fingerprint_fields() == row.fingerprint_fields(), one.name


def test_overrides_of_the_command_line_come_last(tmp_path: Path) -> None:
    found = variants(load_sweep(written(tmp_path, axes=AXES)), ["finetune.lr=5e-4", "data=elsewhere"])
    assert {(one.recipe.finetune.lr, one.recipe.data) for one in found} == {(5e-4, "elsewhere")}


def test_excluded_combinations_are_left_out(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path, axes=AXES, exclude=[{"connector": "random", "rate": "high"}]))
    assert [one.name for one in variants(sweep, [])] == [
        "connector=pretrained rate=low",
        "connector=pretrained rate=high",
        "connector=random rate=low",
    ]


def test_a_sweep_without_axes_is_the_recipe_itself(tmp_path: Path) -> None:
    (only,) = variants(load_sweep(written(tmp_path)), [])
    assert (only.name, only.recipe.name) == ("", "llava-gemma-2b")


@given(st.lists(st.integers(1, 3), max_size=3), st.lists(st.integers(0, 9), max_size=3, unique=True))
def test_there_are_as_many_variants_as_combinations_and_no_two_alike(sizes: list[int], seeds: list[int]) -> None:
    axes = {f"axis{n}": {f"level{k}": {"finetune.epochs": k + 1} for k in range(size)} for n, size in enumerate(sizes)}
    recipe = str(recipes_folder() / "llava-gemma-2b.yaml")
    found = variants(Sweep(name="test", recipe=recipe, axes=axes, seeds=tuple(seeds)), [])
    expected = max(1, len(seeds))
    for size in sizes:
        expected *= size
    assert len({one.name for one in found}) == len(found) == expected


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"axes": {"rate": {"low": {"finetune.lrr": 1}}}}, "did you mean 'finetune.lr'?"),
        ({"axes": {"rate": {"low": 1e-5}}}, "level 'low' must give recipe keys and values"),
        ({"axes": AXES, "exclude": [{"conector": "random"}]}, "exclude names the axis 'conector'"),
        ({"axes": AXES, "exclude": [{"rate": "middle"}]}, "its levels are low, high"),
        ({"axes": AXES, "exclude": [{}]}, "every combination of the sweep is excluded"),
        ({"axes": AXES, "seeds": [1, 1]}, "must differ"),
        ({"axis": AXES}, "did you mean 'axes'?"),
        ({"recipe": "nowhere.yaml"}, "cannot read the recipe"),
        ({"search": {"space": SPACE, "objective": LOSS}}, "a search needs an end"),
        ({"search": {"space": {}, "objective": LOSS, "trials": 2}}, "search.space"),
        ({"search": {"space": SPACE, "objective": {"los": "min"}, "trials": 2}}, "known here: loss, seconds"),
        ({"search": {"space": {"finetune.lr": {"loguniform": [0, 1]}}, "objective": LOSS, "trials": 2}}, "above 0"),
        ({"search": {"space": {"finetune.lr": {"uniform": [1, 0.1]}}, "objective": LOSS, "trials": 2}}, "be below"),
        ({"search": {"space": {"finetune.lr": {"uniform": [1, 2], "int": [1, 2]}}, "objective": LOSS}}, "give one of"),
        (
            {"search": {"space": {"finetune.lr": {"uniform": [1e-5, 5]}}, "objective": LOSS, "trials": 2}},
            "finetune.lr=5",
        ),
        ({"search": {"space": {"finetune.lrr": {"int": [1, 2]}}, "objective": LOSS, "trials": 2}}, "'finetune.lr'?"),
        ({"axes": AXES, "search": {"space": SPACE, "objective": LOSS, "trials": 2}}, "is set by an axis, `set`"),
        (
            {"search": {"space": SPACE, "objective": LOSS | {"seconds": "min"}, "trials": 2, "asha": {}}},
            "one objective",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line_with_the_fix(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        variants(load_sweep(written(tmp_path, **settings)), [])
    assert told in str(error.value)
    assert "\n" not in str(error.value)
