"""Backbones are resolved from their configuration files; unsupported ones are rejected in one line."""

import json
import shutil
from pathlib import Path

import pytest

from raylava.artifacts import Artifact
from raylava.config.recipe import Language, Vision
from raylava.errors import UserError
from raylava.models.hub import weights_identity
from raylava.models.registry import resolve_language, resolve_vision, validate_backbones


def test_dinov2_accepts_another_image_size_and_clip_does_not(toy_assets: Artifact) -> None:
    dinov2 = Vision(name=str(toy_assets.path / "backbones" / "dinov2"), image_size=128)
    assert resolve_vision(dinov2).image_tokens == 64
    with pytest.raises(UserError, match="takes 96 only"):
        resolve_vision(Vision(name=str(toy_assets.path / "backbones" / "clip"), image_size=128))
    with pytest.raises(UserError, match="not a multiple of"):
        resolve_vision(dinov2.model_copy(update={"image_size": 50}))


@pytest.mark.parametrize(
    ("language", "vision", "message"),
    [
        (
            {"name": "gogle/gemma"},
            {"name": "openai/clip-vit-large-patch14-336"},
            "choose one of: google/gemma-2b-it",
        ),
        ({"name": "google/gemma-2b-it"}, {"name": "some/vit"}, "neither a folder nor a known hub id"),
        (
            {"name": "google/gemma-2b-it", "family": "lama"},
            {"name": "facebook/dinov2-large"},
            "choose one of: gemma",
        ),
        ({"name": "./missing"}, {"name": "facebook/dinov2-large"}, "no such folder"),
    ],
)
def test_unknown_backbone_is_rejected_without_network_access(
    language: dict[str, str], vision: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        validate_backbones(Language(**language), Vision(**vision))


def test_unknown_family_is_rejected_wherever_a_backbone_is_resolved(siglip: Path) -> None:
    with pytest.raises(UserError, match=r"model\.vision\.family='vit' is not supported; choose one of: clip, dinov2"):
        resolve_vision(Vision(name=str(siglip), family="vit"))


def test_folder_of_an_unsupported_family_is_rejected_by_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8, "vocab_size": 8}))
    with pytest.raises(UserError, match="'bert' is not a supported language family; choose one of: gemma"):
        resolve_language(Language(name=str(tmp_path)))


def test_weights_of_a_folder_are_identified_by_content_not_location(siglip: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(siglip, tmp_path / "copy")
    assert weights_identity(str(siglip), "main") == weights_identity(str(copy), "main")
    (copy / "config.json").write_text("{}")
    other = shutil.copytree(copy, tmp_path / "other")
    assert weights_identity(str(siglip), "main") != weights_identity(str(other), "main")


def test_fields_that_a_config_omits_have_transformers_defaults(siglip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(siglip, tmp_path / "omitting")
    config = json.loads((folder / "config.json").read_text())
    vision_config = {name: config[name] for name in ("model_type", "image_size")}  # as published SigLIP models do
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": vision_config}))
    spec = resolve_vision(Vision(name=str(folder)))
    assert (spec.family, spec.shape.patch, spec.shape.width, spec.image_tokens) == ("siglip", 16, 768, 4)


def test_siglip_accepts_its_own_image_size_only(siglip: Path) -> None:
    with pytest.raises(UserError, match="takes 32 only"):
        resolve_vision(Vision(name=str(siglip), image_size=64))
