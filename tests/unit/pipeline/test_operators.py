"""Operators in a recipe: they reach the stage, its fingerprint, and the benchmarks that they name."""

from pathlib import Path
from typing import Any

import pytest

from raylava.artifacts import Artifact
from raylava.errors import UserError
from raylava.pipeline.graph import build_stages
from raylava.pipeline.stages import PrepareStage
from raylava.storage import storage_path
from raylava.toy.demo import toy_recipe


def prepare_stage(toy_assets: Artifact, storage: Path, *overrides: str) -> PrepareStage:
    recipe = toy_recipe(toy_assets.path, ["pretrain.enabled=false", *overrides])
    (stage,) = (stage for stage in build_stages(recipe, storage_path(storage)) if isinstance(stage, PrepareStage))
    return stage


def fields(toy_assets: Artifact, storage: Path, *overrides: str) -> dict[str, Any]:
    return prepare_stage(toy_assets, storage, *overrides).fingerprint_fields()


def test_corpus_without_operators_keeps_its_fingerprint(toy_assets: Artifact, tmp_path: Path) -> None:
    plain = fields(toy_assets, tmp_path)
    assert not {"operator_sources", "benchmark_images"} & plain.keys()
    filtered = fields(toy_assets, tmp_path, "corpora.instruction.operators=[answer_words]")
    assert {key for key in filtered if filtered[key] != plain.get(key)} == {"corpus"}


def test_users_function_and_compared_images_enter_the_fingerprint(toy_assets: Artifact, tmp_path: Path) -> None:
    operators = (
        "corpora.instruction.operators=['tests.support.user_operators:twice', {decontaminate: {benchmarks: [all]}}]"
    )
    with pytest.raises(UserError, match=r"corpora.instruction.operators: decontaminate: 'all' is no benchmark of"):
        fields(toy_assets, tmp_path, operators)
    name = toy_recipe(toy_assets.path, []).evaluate[0].name
    result = fields(toy_assets, tmp_path, operators.replace("[all]", f"[{name}]"))
    assert len(result["operator_sources"][0]) == 64
    assert result["benchmark_images"][0]


def test_unknown_operator_is_refused_before_any_stage_runs(toy_assets: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^corpora.instruction.operators: unknown operator 'answer_word'; choose"):
        prepare_stage(toy_assets, tmp_path, "corpora.instruction.operators=[answer_word]")
