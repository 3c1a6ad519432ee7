"""Image features enter the language model at the scale of token embeddings, in training and in the exported model."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from raylava.corpus.blocks import Blocks
from raylava.models.connector import (
    CONNECTOR,
    CONNECTOR_FILE,
    connector_factor,
    feature_factor,
    load_connector,
    running_feature_factor,
    save_connector,
)
from raylava.models.export import export_model
from raylava.models.families import gemma
from raylava.models.llava import PackLoss, build_llava, trained_vocabulary
from raylava.models.registry import ResolvedModel
from raylava.train.data_loader import PackCollator
from tests.support.packs import on_cpu

SCALE = 32**0.5  # of the toy language model
FP32_TOLERANCE, BF16_TOLERANCE = 1e-6, 1e-2  # of the logits' norm; docs/numerics.md states 4e-7 and 6e-3


def of_convention(model: ResolvedModel, feature_scale: str) -> ResolvedModel:
    return dataclasses.replace(model, feature_scale=feature_scale)


def layer_0_input(llava: LlavaForConditionalGeneration, pack: Any) -> torch.Tensor:
    """Return what the first layer of the language model receives: (T, width)."""
    received: list[torch.Tensor] = []
    layer = llava.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: received.append(args[0][0]), with_kwargs=True)
    with torch.inference_mode():
        llava(input_ids=pack.input_ids, pixel_values=pack.pixel_values)
    hook.remove()
    return received[0]


@pytest.mark.parametrize(("feature_scale", "factor"), [("embedding", SCALE), ("none", 1.0)])
def test_first_layer_receives_scaled_image_features_beside_scaled_token_embeddings(
    feature_scale: str,
    factor: float,
    resolved_model: ResolvedModel,
    prepared_blocks: Blocks,
    pack_collator: PackCollator,
) -> None:
    llava = build_llava(of_convention(resolved_model, feature_scale), 0, torch.float32).eval()
    assert pytest.approx(llava.config.text_config.hidden_size**0.5) == SCALE
    pack = on_cpu(pack_collator.collate([prepared_blocks[0]]))
    received = layer_0_input(llava, pack)
    is_image = pack.input_ids[0] == llava.config.image_token_id
    with torch.inference_mode():
        features = llava.model.get_image_features(pack.pixel_values).pooler_output[0]
        tower = llava.model.vision_tower(pack.pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        connector = llava.model.multi_modal_projector
        unscaled = connector.linear_2(connector.act(connector.linear_1(tower)))[0]
    rows = torch.nn.functional.embedding(pack.input_ids[0], llava.model.language_model.embed_tokens.weight)
    torch.testing.assert_close(received[is_image], features)
    torch.testing.assert_close(received[is_image], factor * unscaled)
    torch.testing.assert_close(received[~is_image], SCALE * rows[~is_image])


@pytest.mark.parametrize(
    ("width", "dtype", "expected"),
    [(2048, torch.bfloat16, 45.25), (3072, torch.bfloat16, 55.5), (3072, torch.float32, 3072**0.5)],
)
def test_factor_is_rounded_to_the_compute_dtype(
    resolved_model: ResolvedModel, width: int, dtype: torch.dtype, expected: float
) -> None:
    language = dataclasses.replace(
        resolved_model.language, embedding_scale=gemma.embedding_scale({"hidden_size": width})
    )
    model = dataclasses.replace(resolved_model, language=language)
    assert feature_factor(model, dtype) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("feature_scale", ["embedding", "none"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FP32_TOLERANCE), (torch.bfloat16, BF16_TOLERANCE)], ids=["fp32", "bf16"]
)
def test_exported_model_computes_the_logits_of_training(
    feature_scale: str,
    dtype: torch.dtype,
    tolerance: float,
    resolved_model: ResolvedModel,
    prepared_blocks: Blocks,
    pack_collator: PackCollator,
    tmp_path: Path,
) -> None:
    model = of_convention(resolved_model, feature_scale)
    llava = build_llava(model, 0, dtype).eval()
    export_model(llava, None, model, "pad", tmp_path)
    exported = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
    pack = pack_collator.collate([prepared_blocks[0]]).to(torch.device("cpu"), dtype)
    with torch.inference_mode():
        trained = PackLoss(llava).logits(pack)
        logits = exported(input_ids=pack.input_ids, pixel_values=pack.pixel_values).logits[0, pack.target_positions]
    difference = (logits[:, : trained_vocabulary(llava)] - trained).float()
    assert float(difference.norm() / trained.float().norm()) < tolerance


def test_first_layer_of_the_exported_model_receives_the_rows_of_training(
    resolved_model: ResolvedModel, prepared_blocks: Blocks, pack_collator: PackCollator, tmp_path: Path
) -> None:
    llava = build_llava(resolved_model, 0, torch.float32).eval()
    export_model(llava, None, resolved_model, "pad", tmp_path)
    exported = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    pack = on_cpu(pack_collator.collate([prepared_blocks[0]]))
    torch.testing.assert_close(layer_0_input(exported, pack), layer_0_input(llava, pack), rtol=1e-5, atol=1e-5)


def test_weights_are_folded_from_fp32_values(resolved_model: ResolvedModel, tmp_path: Path) -> None:
    """The factor of a bf16 run multiplies the optimizer's fp32 weights, and the product is rounded once."""
    llava = build_llava(resolved_model, 0, torch.bfloat16)
    factor = running_feature_factor(llava)
    name = f"{CONNECTOR}linear_2.weight"
    weights = {key: value.detach().clone() for key, value in llava.named_parameters()}
    weights[name] = weights[name].float() * (1 + 1e-3)
    export_model(llava, weights, resolved_model, "pad", tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        folded = file.get_tensor("multi_modal_projector.linear_2.weight")
    assert torch.equal(folded, (weights[name] * factor).to(torch.bfloat16))
    assert not torch.equal(folded, (weights[name].to(torch.bfloat16) * factor).to(torch.bfloat16))


def test_connector_trained_in_one_convention_gives_the_same_features_in_the_other(
    resolved_model: ResolvedModel, prepared_blocks: Blocks, pack_collator: PackCollator, tmp_path: Path
) -> None:
    pack = on_cpu(pack_collator.collate([prepared_blocks[0]]))
    scaled = build_llava(of_convention(resolved_model, "embedding"), 7, torch.float32)
    weights = {name: value.detach() for name, value in scaled.named_parameters() if name.startswith(CONNECTOR)}
    save_connector(weights, running_feature_factor(scaled), tmp_path / CONNECTOR_FILE)
    assert connector_factor(tmp_path / CONNECTOR_FILE) == pytest.approx(SCALE)
    expected = layer_0_input(scaled, pack)
    for feature_scale in ("embedding", "none"):
        loaded = build_llava(of_convention(resolved_model, feature_scale), 1, torch.float32)
        load_connector(loaded, str(tmp_path))
        torch.testing.assert_close(layer_0_input(loaded, pack), expected)
