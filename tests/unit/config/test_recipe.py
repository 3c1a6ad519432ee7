"""A recipe holds every setting that determines a result; a mistake in it is reported in one line with its fix."""

from pathlib import Path

import pytest
import yaml

from raylava.config.load import RENAMED_KEYS, _sections, _suggest_key, load_recipe, parse_yaml
from raylava.config.recipe import Recipe
from raylava.errors import UserError
from raylava.models.registry import validate_backbones
from raylava.toy.demo import recipes_folder

SHIPPED = sorted(
    path.name for path in recipes_folder().glob("*.yaml") if "axes:" not in path.read_text()
)  # those files are sweeps

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
def test_recipes_of_the_paper_have_its_backbones_and_settings(name: str) -> None:
    recipe = load_recipe(str(recipes_folder() / name))
    validate_backbones(recipe.model.language, recipe.model.vision)
    assert (recipe.pretrain.global_batch_size, recipe.pretrain.lr) == (256, 1e-3)
    assert (recipe.finetune.global_batch_size, recipe.finetune.lr, recipe.finetune.warmup_ratio) == (128, 2e-5, 0.03)
    assert recipe.model.connector.feature_scale == "embedding"
    assert {stage.warmup_start for stage in (recipe.pretrain, recipe.finetune)} == {"zero"}
    assert recipe.pretrain.enabled != name.endswith("-no-pretrain.yaml")
    assert recipe.corpora.alignment is not None
    assert (recipe.corpora.alignment.image_aspect, recipe.corpora.instruction.image_aspect) == ("crop", "pad")


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("llava-gemma")])
def test_recipes_of_the_paper_weight_the_loss_as_the_published_scripts(name: str) -> None:
    """DEVICE_BATCHSIZE of Intel's pretrain_gaudi.sh and finetune_gaudi.sh, by the size of the language model."""
    recipe = load_recipe(str(recipes_folder() / name))
    groups = [(stage.loss_weighting, stage.loss_group_size) for stage in (recipe.pretrain, recipe.finetune)]
    if name == "llava-gemma-2b-token-mean.yaml":
        assert groups == [("tokens", None)] * 2
        return
    assert groups == ([("groups", 8), ("groups", 1)] if "7b" in name else [("groups", 16), ("groups", 2)])
    assert (recipe.pretrain.batching, recipe.finetune.batching) == ("mixed", "by_modality")
    assert recipe.corpora.instruction.on_overlong == "truncate_tokens"
    assert recipe.model.vision.resize_size == (256 if "dinov2" in name else None)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("finetune.lr=1e-4", 1e-4),
        ("finetune.epochs=3", 3),
        ("pretrain.enabled=false", False),
        ("corpora.instruction.max_length=512", 512),
        ("data=s3://bucket/corpus/", "s3://bucket/corpus"),
        ("model.language.name='123'", "123"),
    ],
)
def test_override_sets_one_key(minimal: str, override: str, value: object) -> None:
    setting: object = load_recipe(minimal, [override])
    for part in override.partition("=")[0].split("."):
        setting = getattr(setting, part)
    assert setting == value


@pytest.mark.parametrize(
    ("override", "message"),
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
        ("finetune.deepspeed={gradient_clipping: 1}", "gradient_clipping is set by raylava"),
        ("finetune.deepspeed={steps_per_print: 1}", "steps_per_print is set by raylava"),
        ("finetune.deepspeed={zero_allow_untested_optimizer: false}", "zero_allow_untested_optimizer is set by"),
        ("finetune.deepspeed={zero_optimization: {stage: 1}}", "zero_optimization.stage is set by raylava"),
        ("finetune.deepspeed={zero_optimization: {overlap_comm: true}}", "zero_optimization.overlap_comm is set by"),
        ("finetune.checkpoint.keep_best=true", "set interval_steps as well"),
        ("finetune.enabled=false", "a recipe always finetunes"),
        ("model.connector.weights=/connector", "replaces pretraining; set pretrain.enabled=false"),
        ("corpora.instruction.image_encoding={format: png, quality: 80}", "quality=80 applies to format jpeg only"),
        (
            "evaluate=[{name: a, questions: q, benchmark: pope, include: ['5/*']}]",
            "only; remove it beside pope",
        ),
        (
            "evaluate=[{name: a, questions: q, benchmark: pope, metric: yes_no}]",
            "metric=yes_no applies to",
        ),
        (
            "evaluate=[{name: a, questions: q, benchmark: pope, categories: {a: b}}]",
            "only; remove it beside pope",
        ),
        ("finetune.loss_weighting=groups", "loss_weighting=groups needs loss_group_size"),
        ("finetune.loss_group_size=2", "set loss_weighting=groups"),
        ("finetune={loss_weighting: groups, loss_group_size: 3}", "does not divide global_batch_size=128"),
        ("model.vision={name: v, image_size: 224, resize_size: 200}", "less than image_size=224; raise it"),
        ("model.initial_weights={name: m, transformers_version: 5.10}", "put the version in quotes"),
        ("finetune={compile: true, zero: {stage: 3}}", "set zero.stage to 2 or less"),
        ("resources.min_workers=2", "more than workers=1"),
        ("finetune", "write key=value"),
        ("name.first=a", "it has no keys below it"),
        ("evaluate=[{name: a, questions: q}, {name: a, questions: q}]", "must differ"),
    ],
)
def test_wrong_setting_is_reported_in_one_line_with_the_fix(minimal: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=r"\S") as error:
        load_recipe(minimal, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n", "this is a list"), ("a: [", "not valid YAML"), ("extends: missing.yaml\n", "cannot read the recipe")],
)
def test_file_that_is_no_recipe_is_reported_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(str(path))


def test_variant_overrides_only_what_differs_from_its_parent(minimal: str, tmp_path: Path) -> None:
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
        "finetune.deepspeed={zero_optimization: {reduce_bucket_size: 1000}}",
        "finetune.deepspeed={wall_clock_breakdown: true}",
    ],
)
def test_setting_that_cannot_change_the_result_is_not_fingerprinted(minimal: str, override: str) -> None:
    assert load_recipe(minimal, [override]).fingerprint_fields() == load_recipe(minimal).fingerprint_fields()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "finetune.lr=1e-5",
        "corpora.instruction.image_aspect=crop",
        "finetune.deepspeed={data_types: {grad_accum_dtype: bf16}}",
        "finetune.checkpoint={interval_steps: 4, keep_best: true}",
        "finetune.deepspeed={zero_optimization: {zero_quantized_weights: true}}",
    ],
)
def test_setting_that_determines_the_result_is_fingerprinted(minimal: str, override: str) -> None:
    assert load_recipe(minimal, [override]).fingerprint_fields() != load_recipe(minimal).fingerprint_fields()


def test_recipe_is_unchanged_by_writing_and_reading_it(minimal: str) -> None:
    recipe = load_recipe(minimal)
    assert Recipe.model_validate(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe


@pytest.mark.parametrize(("old", "new"), sorted(RENAMED_KEYS.items()))
def test_renamed_key_is_refused_with_the_new_key(old: str, new: str) -> None:
    """Every renamed key has its new name in the recipe's config classes, and the message of its section names it."""
    keys = {(path, name) for path, section in _sections(Recipe, ()) for name in section.model_fields}
    paths = [path for path, name in keys if name == new]
    assert paths, f"{new} is no key of a recipe"
    for path in paths:
        assert f"it was renamed to '{'.'.join((*path, new))}'" in _suggest_key((*path, old), Recipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("finetune.global_batch=8", "it was renamed to 'finetune.global_batch_size'"),
        ("finetune.checkpoints={every_minutes: 1}", "it was renamed to 'finetune.checkpoint'"),
        ("corpora.instruction.on_overlong=trim", "was renamed to 'truncate_exchanges'"),
        ("evaluate=[{name: a, questions: q, baselines: [blank_pictures]}]", "was renamed to 'blank_images'"),
    ],
)
def test_old_key_or_value_in_a_recipe_is_refused_with_the_new_one(minimal: str, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(minimal, [override])
    assert message in str(error.value)


def test_yaml_merges_may_override_keys_but_a_mapping_has_a_key_once() -> None:
    merged = parse_yaml("base: &base {lr: 1}\na: &a\n  <<: *base\n  lr: 2\nb:\n  <<: *a\n  lr: 3\n")
    assert merged == {"base": {"lr": 1}, "a": {"lr": 2}, "b": {"lr": 3}}
    with pytest.raises(yaml.YAMLError, match="the key 'lr' occurs twice"):
        parse_yaml("a:\n  lr: 2\n  lr: 3\n")
