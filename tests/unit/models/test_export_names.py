"""The weights of an exported model have the names that published checkpoints of the class have, family by family."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from raylava.artifacts import Artifact
from raylava.config.recipe import Language, Model, Vision
from raylava.models.export import export_model
from raylava.models.llava import build_llava
from raylava.models.registry import LanguageSpec, resolve_model


def both(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


# The names outside of repeated layers and of the first layer: llava-hf/llava-1.5-7b-hf for the language model, the
# connector and CLIP; LLaVA checkpoints with that tower for SigLIP; transformers 4.57 for DINOv2. Gemma differs from
# Llama in its tied output layer, which is left out.
LANGUAGE_NAMES = {
    "language_model.model.embed_tokens.weight",
    "language_model.model.norm.weight",
    "language_model.model.layers.0.input_layernorm.weight",
    "language_model.model.layers.0.post_attention_layernorm.weight",
    "language_model.model.layers.0.mlp.down_proj.weight",
    "language_model.model.layers.0.mlp.gate_proj.weight",
    "language_model.model.layers.0.mlp.up_proj.weight",
    "language_model.model.layers.0.self_attn.q_proj.weight",
    "language_model.model.layers.0.self_attn.k_proj.weight",
    "language_model.model.layers.0.self_attn.v_proj.weight",
    "language_model.model.layers.0.self_attn.o_proj.weight",
}
CONNECTOR_NAMES = both("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
VIT = "vision_tower.vision_model"
VIT_NAMES = {
    f"{VIT}.embeddings.patch_embedding.weight",
    f"{VIT}.embeddings.position_embedding.weight",
    *both(
        f"{VIT}.post_layernorm",
        f"{VIT}.encoder.layers.0.layer_norm1",
        f"{VIT}.encoder.layers.0.layer_norm2",
        f"{VIT}.encoder.layers.0.mlp.fc1",
        f"{VIT}.encoder.layers.0.mlp.fc2",
        f"{VIT}.encoder.layers.0.self_attn.q_proj",
        f"{VIT}.encoder.layers.0.self_attn.k_proj",
        f"{VIT}.encoder.layers.0.self_attn.v_proj",
        f"{VIT}.encoder.layers.0.self_attn.out_proj",
    ),
}
DINO = "vision_tower"
VISION_NAMES = {
    "clip": VIT_NAMES | {f"{VIT}.embeddings.class_embedding"} | both(f"{VIT}.pre_layrnorm"),
    "siglip": VIT_NAMES
    | {
        f"{VIT}.embeddings.patch_embedding.bias",
        f"{VIT}.head.attention.in_proj_bias",
        f"{VIT}.head.attention.in_proj_weight",
        f"{VIT}.head.probe",
    }
    | both(f"{VIT}.head.attention.out_proj", f"{VIT}.head.layernorm", f"{VIT}.head.mlp.fc1", f"{VIT}.head.mlp.fc2"),
    "dinov2": {
        f"{DINO}.embeddings.cls_token",
        f"{DINO}.embeddings.mask_token",
        f"{DINO}.embeddings.position_embeddings",
        f"{DINO}.encoder.layer.0.layer_scale1.lambda1",
        f"{DINO}.encoder.layer.0.layer_scale2.lambda1",
    }
    | both(
        f"{DINO}.embeddings.patch_embeddings.projection",
        f"{DINO}.layernorm",
        f"{DINO}.encoder.layer.0.attention.attention.query",
        f"{DINO}.encoder.layer.0.attention.attention.key",
        f"{DINO}.encoder.layer.0.attention.attention.value",
        f"{DINO}.encoder.layer.0.attention.output.dense",
        f"{DINO}.encoder.layer.0.mlp.fc1",
        f"{DINO}.encoder.layer.0.mlp.fc2",
        f"{DINO}.encoder.layer.0.norm1",
        f"{DINO}.encoder.layer.0.norm2",
    ),
}


@pytest.mark.parametrize("family", VISION_NAMES)
def test_exported_weights_have_the_names_of_published_checkpoints(
    family: str, toy_assets: Artifact, siglip: Path, tmp_path: Path, language: LanguageSpec
) -> None:
    folder = str(siglip) if family == "siglip" else str(toy_assets.path / "backbones" / family)
    model = resolve_model(Model(language=Language(name=language.name), vision=Vision(name=folder)))
    export_model(build_llava(model, 0, torch.float32), None, model, "pad", tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    in_later_layers = {name for name in names if re.search(r"\.layers?\.[1-9]", name)}
    assert names - in_later_layers == LANGUAGE_NAMES | CONNECTOR_NAMES | VISION_NAMES[family]
    assert {re.sub(r"(\.layers?\.)\d+", r"\g<1>0", name) for name in in_later_layers} <= names
