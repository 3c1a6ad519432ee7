"""A recipe says everything that decides a result, and a mistake in it is told in one line."""

from pathlib import Path

import pytest
import yaml

from raylava.config.load import load_recipe
from raylava.config.recipe import Recipe
from raylava.errors import UserError
from raylava.models.registry import validate_backbones
from raylava.toy.demo import recipes_folder

SHIPPED = sorted(
    path.name for path in recipes_folder().glob("*.yaml") if "ablations" not in path.name
)  # those are sweeps

MINIMAL = {
    "name": "minimal",
    "model": {"language": {"name": "google/gemma-2b-it"}, "vision": {"name": "openai/clip-vit-large-patch14-336"}},
    "corpora": {"alignment": {"sources": [{"annotations": "a"}]}, "instruction": {"sources": [{"annotations": "i"}]}},
}


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return str(path)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_loads(name: str) -> None:
    assert load_recipe(str(recipes_folder() / name)).name == name.removesuffix(".yaml")


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("llava-gemma")])
def test_the_papers_recipes_name_known_backbones_and_the_papers_settings(name: str) -> None:
    recipe = load_recipe(str(recipes_folder() / name))
    validate_backbones(recipe.model.language, recipe.model.vision)
    assert (recipe.pretrain.global_batch_size, recipe.pretrain.lr) == (256, 1e-3)
    assert (recipe.finetune.global_batch_size, recipe.finetune.lr, recipe.finetune.warmup_ratio) == (128, 2e-5, 0.03)
    assert recipe.pretrain.enabled != name.endswith("-no-pretrain.yaml")
    assert recipe.corpora.alignment is not None
    assert (recipe.corpora.alignment.image_aspect, recipe.corpora.instruction.image_aspect) == ("crop", "pad")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("finetune.lr=1e-4", 1e-4),
        ("finetune.epochs=3", 3),
        ("pretrain.enabled=false", False),
        ("corpora.instruction.max_length=512", 512),
        ("data=s3://bucket/corpus/", "s3://bucket/corpus"),
    ],
)
def test_an_override_sets_one_key(minimal: str, override: str, value: object) -> None:
    found: object = load_recipe(minimal, [override])
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("finetune.learning_rte=1", "unknown key 'finetune.learning_rte'"),
        ("finetune.lrr=1", "did you mean 'finetune.lr'?"),
        ("finetuen.lr=1", "did you mean 'finetune'?"),
        ("finetune.lr=-1", "finetune.lr=-1"),
        ("finetune.lr=fast", "finetune.lr='fast'"),
        ("finetune.warmup_ratio=2", "less than or equal to 1"),
        ("finetune.precision=fp8", "'bf16' or 'fp32'"),
        ("finetune.zero.stage=4", "finetune.zero.stage=4"),
        ("finetune.zero={stage: 1, offload_parameters: true}", "set zero.stage=3"),
        ("corpora.alignment=null", "set pretrain.enabled=false"),
        ("corpora.instruction.sources.0.exclud=1", "did you mean 'corpora.instruction.sources.exclude'?"),
        ("corpora.instruction.sources=[]", "at least 1 item"),
        ("finetune.max_tokens_per_pack=64", "raise finetune.max_tokens_per_pack"),
        ("finetune.deepspeed={gradient_clipping: 1}", "gradient_clipping follows from the recipe's own settings"),
        ("finetune.deepspeed={zero_optimization: {stage: 1}}", "zero_optimization.stage follows from"),
        ("finetune={compile: true, zero: {stage: 3}}", "set zero.stage to 2 or less"),
        ("resources.min_workers=2", "more than workers=1"),
        ("finetune", "write key=value"),
        ("name.first=a", "it has no keys below it"),
        ("evaluate=[{name: a, questions: q}, {name: a, questions: q}]", "must differ"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line_with_the_fix(minimal: str, override: str, told: str) -> None:
    with pytest.raises(UserError, match=r"\S") as error:
        load_recipe(minimal, [override])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [("- a\n", "this is a list"), ("a: [", "not valid YAML"), ("extends: missing.yaml\n", "cannot read the recipe")],
)
def test_a_file_that_is_no_recipe_is_told_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        load_recipe(str(path))


def test_a_variant_overrides_only_what_differs_from_its_parent(minimal: str, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: minimal.yaml\nname: child\nfinetune: {lr: 1.0e-5}\n")
    parent, variant = load_recipe(minimal), load_recipe(str(child))
    assert variant == parent.model_copy(
        update={"name": "child", "finetune": parent.finetune.model_copy(update={"lr": 1e-5})}
    )


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(UserError, match="extends itself"):
        load_recipe(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "data=elsewhere",
        "resources.workers=64",
        "finetune.zero.stage=3",
        "finetune.max_tokens_per_pack=8192",
        "finetune.activation_checkpointing=true",
        "finetune.checkpoint.interval_minutes=1",
    ],
)
def test_what_does_not_decide_the_result_is_not_in_a_recipes_content(minimal: str, override: str) -> None:
    assert load_recipe(minimal, [override]).fingerprint_fields() == load_recipe(minimal).fingerprint_fields()


@pytest.mark.parametrize("override", ["seed=1", "finetune.lr=1e-5", "corpora.instruction.image_aspect=crop"])
def test_what_decides_the_result_is_in_a_recipes_content(minimal: str, override: str) -> None:
    assert load_recipe(minimal, [override]).fingerprint_fields() != load_recipe(minimal).fingerprint_fields()


def test_a_recipe_survives_being_written_and_read(minimal: str) -> None:
    recipe = load_recipe(minimal)
    assert Recipe.model_validate(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe
