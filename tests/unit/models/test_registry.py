"""Every family is known by its configuration; what is unknown or doesn't fit is told in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from raylava.artifacts import Artifact
from raylava.config.recipe import Connector, Language, Model, Vision
from raylava.errors import UserError
from raylava.evaluate.engines import TransformersEngine
from raylava.models.export import publish
from raylava.models.llava import CONNECTOR, CONNECTOR_FILE, build_llava, validate_connector
from raylava.models.registry import (
    LanguageSpec,
    VisionSpec,
    validate_backbones,
    load_tokenizer,
    resolve_language,
    resolve_vision,
    weights_identity,
)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siglip")
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    SiglipVisionModel(config).save_pretrained(folder)
    about = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return folder


def vision_folder(toy_assets: Artifact, siglip: Path, family: str) -> str:
    return str(siglip) if family == "siglip" else str(toy_assets.path / "backbones" / family)


@pytest.mark.parametrize(
    ("family", "tokens", "strategy"), [("clip", 36, "default"), ("dinov2", 36, "default"), ("siglip", 16, "full")]
)
def test_each_vision_family_answers_through_a_published_model(
    family: str, tokens: int, strategy: str, toy_assets: Artifact, siglip: Path, tmp_path: Path, language: LanguageSpec
) -> None:
    """Token count and CLS rule are right if, and only if, the assembled model accepts the processor's placeholders."""
    model = Model(language=Language(name=language.name), vision=Vision(name=vision_folder(toy_assets, siglip, family)))
    spec = resolve_vision(model.vision)
    assert (spec.family, spec.image_tokens, spec.select_strategy) == (family, tokens, strategy)
    llava = build_llava(model, spec, 0, torch.float32)
    publish(llava, None, load_tokenizer(model.language), spec, language, "pad", tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    assert isinstance(TransformersEngine(str(tmp_path), torch.device("cpu")).answer(["What?"], [image], 3)[0], str)


def test_dinov2_takes_another_image_size_and_clip_does_not(toy_assets: Artifact) -> None:
    dinov2 = Vision(name=str(toy_assets.path / "backbones" / "dinov2"), image_size=64)
    assert resolve_vision(dinov2).image_tokens == 64
    with pytest.raises(UserError, match="matches_filters 48 only"):
        resolve_vision(Vision(name=str(toy_assets.path / "backbones" / "clip"), image_size=64))
    with pytest.raises(UserError, match="not a multiple of"):
        resolve_vision(dinov2.model_copy(update={"image_size": 50}))


@pytest.mark.parametrize(
    ("language", "vision", "told"),
    [
        ({"name": "gogle/gemma"}, {"name": "openai/clip-vit-large-patch14-336"}, "known: google/gemma-2b-it"),
        ({"name": "google/gemma-2b-it"}, {"name": "some/vit"}, "neither a folder nor a known hub id"),
        ({"name": "google/gemma-2b-it", "family": "lama"}, {"name": "facebook/dinov2-large"}, "known: gemma"),
        ({"name": "./missing"}, {"name": "facebook/dinov2-large"}, "no such folder"),
    ],
)
def test_an_unknown_backbone_is_told_without_network(language: dict, vision: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        validate_backbones(Language(**language), Vision(**vision))


def test_a_folder_of_another_family_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8, "vocab_size": 8}))
    with pytest.raises(UserError, match="'bert' is not a language family raylava knows; known: gemma"):
        resolve_language(Language(name=str(tmp_path)))


def test_a_connector_that_does_not_fit_is_told_by_its_widths(
    tmp_path: Path, vision: VisionSpec, language: LanguageSpec
) -> None:
    weights = {f"{CONNECTOR}linear_1.weight": torch.zeros(8, 4), f"{CONNECTOR}linear_2.weight": torch.zeros(8, 8)}
    save_file(weights, tmp_path / CONNECTOR_FILE)
    with pytest.raises(UserError, match=r"joins widths 4 → 8, but .* is 16 wide"):
        validate_connector(str(tmp_path), vision, language)
    with pytest.raises(UserError, match="no raylava connector there"):
        validate_connector(str(tmp_path / "nowhere"), vision, language)


def test_a_fitting_connector_is_put_in_place(
    tmp_path: Path, toy_model: Model, vision: VisionSpec, language: LanguageSpec
) -> None:
    trained = build_llava(toy_model, vision, seed=7, dtype=torch.float32).model.multi_modal_projector
    save_file({CONNECTOR + name: value for name, value in trained.state_dict().items()}, tmp_path / CONNECTOR_FILE)
    validate_connector(str(tmp_path), vision, language)
    model = toy_model.model_copy(update={"connector": Connector(weights=str(tmp_path))})
    loaded = build_llava(model, vision, seed=1, dtype=torch.float32).model.multi_modal_projector
    for name, value in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_folders_weights_are_identified_by_content_not_by_place(siglip: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(siglip, tmp_path / "copy")
    assert weights_identity(str(siglip), "main") == weights_identity(str(copy), "main")
    (copy / "config.json").write_text("{}")
    other = shutil.copytree(copy, tmp_path / "other")
    assert weights_identity(str(siglip), "main") != weights_identity(str(other), "main")


def test_a_new_image_token_gets_a_row_that_is_not_likely_to_be_generated(toy_model: Model, vision: VisionSpec) -> None:
    tokenizer = load_tokenizer(toy_model.language)
    llava = build_llava(toy_model, vision, seed=0, dtype=torch.float32)
    table = llava.get_input_embeddings().weight
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    assert image_id < len(table)
    assert llava.config.image_token_id == image_id
    assert llava.lm_head.weight is llava.model.language_model.embed_tokens.weight, "Gemma ties its embeddings"
