"""A sweep file expands to every combination that is not excluded, each a valid recipe, or is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylava.config.load import load_recipe
from raylava.errors import UserError
from raylava.toy.demo import recipes_folder
from raylava.tune.sweep import SweepConfig, load_sweep
from raylava.tune.variants import variants

SPACE = {"finetune.lr": {"loguniform": [1e-6, 1e-4]}}
LOSS = {"loss": "min"}
AXES = {
    "connector": {"pretrained": {"pretrain.enabled": True}, "random": {"pretrain.enabled": False}},
    "rate": {"low": {"finetune.lr": 1e-5}, "high": {"finetune.lr": 1e-3}},
}


def write_sweep(folder: Path, **settings: Any) -> str:
    """Write a sweep of the shipped 2B recipe and return the path of its file."""
    sweep = {"name": "test", "recipe": str(recipes_folder() / "llava-gemma-2b.yaml")} | settings
    (folder / "sweep.yaml").write_text(json.dumps(sweep))  # JSON is YAML
    return str(folder / "sweep.yaml")


def test_axes_and_seeds_are_crossed_and_their_settings_applied_to_the_recipe(tmp_path: Path) -> None:
    expanded = variants(load_sweep(write_sweep(tmp_path, axes=AXES, seeds=[0, 1], set={"finetune.epochs": 2})), [])
    assert [variant.name for variant in expanded][:3] == [
        "connector=pretrained rate=low seed=0",
        "connector=pretrained rate=low seed=1",
        "connector=pretrained rate=high seed=0",
    ]
    last = expanded[-1].recipe
    assert (last.pretrain.enabled, last.finetune.lr, last.seed, last.finetune.epochs) == (False, 1e-3, 1, 2)
    assert len(expanded) == 8


def test_shipped_ablations_are_the_eight_shipped_recipes_with_three_seeds_each() -> None:
    expanded = variants(load_sweep(str(recipes_folder() / "ablations.yaml")), [])
    assert len(expanded) == 24
    for variant in expanded:
        levels = variant.levels
        parts = ["llava-gemma", levels["language"], *(["dinov2"] if levels["vision"] == "dinov2" else [])]
        name = "-".join([*parts, *(["no-pretrain"] if levels["connector"] == "random" else [])])
        recipe = load_recipe(str(recipes_folder() / f"{name}.yaml"), [f"seed={variant.seed}"])
        assert variant.recipe.fingerprint_fields() == recipe.fingerprint_fields(), variant.name


def test_command_line_overrides_take_precedence(tmp_path: Path) -> None:
    expanded = variants(load_sweep(write_sweep(tmp_path, axes=AXES)), ["finetune.lr=5e-4", "data=elsewhere"])
    assert {(variant.recipe.finetune.lr, variant.recipe.data) for variant in expanded} == {(5e-4, "elsewhere")}


def test_excluded_combinations_are_left_out(tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path, axes=AXES, exclude=[{"connector": "random", "rate": "high"}]))
    assert [variant.name for variant in variants(sweep, [])] == [
        "connector=pretrained rate=low",
        "connector=pretrained rate=high",
        "connector=random rate=low",
    ]


def test_sweep_without_axes_has_the_recipe_as_its_only_variant(tmp_path: Path) -> None:
    (only,) = variants(load_sweep(write_sweep(tmp_path)), [])
    assert (only.name, only.recipe.name) == ("", "llava-gemma-2b")


@given(st.lists(st.integers(1, 3), max_size=3), st.lists(st.integers(0, 9), max_size=3, unique=True))
def test_there_is_exactly_one_variant_per_combination(sizes: list[int], seeds: list[int]) -> None:
    axes = {f"axis{n}": {f"level{k}": {"finetune.epochs": k + 1} for k in range(size)} for n, size in enumerate(sizes)}
    recipe = str(recipes_folder() / "llava-gemma-2b.yaml")
    expanded = variants(SweepConfig(name="test", recipe=recipe, axes=axes, seeds=tuple(seeds)), [])
    expected = max(1, len(seeds))
    for size in sizes:
        expected *= size
    assert len({variant.name for variant in expanded}) == len(expanded) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axes": {"rate": {"low": {"finetune.lrr": 1}}}}, "did you mean 'finetune.lr'?"),
        ({"axes": {"rate": {"low": 1e-5}}}, "level 'low' must give recipe keys and values"),
        ({"axes": AXES, "exclude": [{"conector": "random"}]}, "exclude names an unknown axis 'conector'"),
        ({"axes": AXES, "exclude": [{"rate": "middle"}]}, "choose one of: low, high"),
        ({"axes": AXES, "exclude": [{}]}, "every combination of the sweep is excluded"),
        ({"axes": AXES, "seeds": [1, 1]}, "must differ"),
        ({"axis": AXES}, "did you mean 'axes'?"),
        ({"recipe": "nowhere.yaml"}, "cannot read the recipe"),
        ({"search": {"space": SPACE, "objective": LOSS}}, "a search needs a budget"),
        ({"search": {"space": {}, "objective": LOSS, "trials": 2}}, "search.space"),
        ({"search": {"space": SPACE, "objective": {"los": "min"}, "trials": 2}}, "choose one of: loss, seconds"),
        ({"search": {"space": {"finetune.lr": {"loguniform": [0, 1]}}, "objective": LOSS, "trials": 2}}, "above 0"),
        ({"search": {"space": {"finetune.lr": {"uniform": [1, 0.1]}}, "objective": LOSS, "trials": 2}}, "be below"),
        ({"search": {"space": {"finetune.lr": {"uniform": [1, 2], "int": [1, 2]}}, "objective": LOSS}}, "give one of"),
        (
            {"search": {"space": {"finetune.lr": {"uniform": [1e-5, 5]}}, "objective": LOSS, "trials": 2}},
            "finetune.lr=5",
        ),
        ({"search": {"space": {"finetune.lrr": {"int": [1, 2]}}, "objective": LOSS, "trials": 2}}, "'finetune.lr'?"),
        ({"axes": AXES, "search": {"space": SPACE, "objective": LOSS, "trials": 2}}, "is also set by an axis, `set`"),
        (
            {"search": {"space": SPACE, "objective": LOSS | {"seconds": "min"}, "trials": 2, "early_stopping": {}}},
            "one objective",
        ),
        (
            {"search": {"space": SPACE, "objective": LOSS, "trials": 2, "early_stopping": {"brackets": 2}}},
            "brackets does not apply to algorithm=asha; remove it",
        ),
    ],
)
def test_invalid_sweep_is_refused_in_one_line_with_the_fix(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        variants(load_sweep(write_sweep(tmp_path, **settings)), [])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
