"""A model built from two backbones: packing changes neither logits nor gradients, and each stage trains its part."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

from raylava.config.recipe import Connector, Language, Model
from raylava.corpus.blocks import Blocks
from raylava.errors import UserError
from raylava.models.connector import (
    CONNECTOR,
    CONNECTOR_FILE,
    VISION_TOWER,
    load_connector,
    running_feature_factor,
    save_connector,
    validate_connector,
)
from raylava.models.llava import (
    PackLoss,
    attn_mismatch,
    build_llava,
    set_trainable,
    trainable_names,
    trained_vocabulary,
)
from raylava.models.registry import LanguageSpec, ResolvedModel, VisionSpec, load_tokenizer, resolve_model
from raylava.train.data_loader import PackCollator
from tests.support.attention import AttentionCalls
from tests.support.packs import collate_groups, loss_and_gradients, on_cpu


@pytest.fixture(scope="module", params=["varlen", "sdpa", "eager"])
def model(resolved_model: ResolvedModel, request: pytest.FixtureRequest) -> PackLoss:
    llava = build_llava(resolved_model, seed=0, dtype=torch.float32, attn_implementation=request.param)
    return PackLoss(llava).eval()


@pytest.fixture(scope="module")
def plain_llava(resolved_model: ResolvedModel) -> LlavaForConditionalGeneration:
    """The model of the `model` fixture, for transformers' own forward pass."""
    return build_llava(resolved_model, seed=0, dtype=torch.float32).eval()


def test_packed_logits_equal_the_logits_of_each_sample_alone(
    model: PackLoss, plain_llava: LlavaForConditionalGeneration, prepared_blocks: Blocks, pack_collator: PackCollator
) -> None:
    numbers = [0, 1, 2, 3]
    with torch.inference_mode():
        (packed,) = collate_groups(prepared_blocks, pack_collator, [numbers])
        packed_logits = model.logits(packed)
        single_logits = [
            plain_llava(input_ids=pack.input_ids, pixel_values=pack.pixel_values).logits[0, pack.target_positions]
            for pack in collate_groups(prepared_blocks, pack_collator, [[number] for number in numbers])
        ]
    expected = torch.cat(single_logits)[:, : trained_vocabulary(plain_llava)]
    torch.testing.assert_close(packed_logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("implementation", "masked", "causal"), [("varlen", 0, 4), ("sdpa", 1, 0), ("eager", 0, 0)], ids=str
)
def test_language_model_computes_attention_by_the_implementation_that_is_asked_for(
    resolved_model: ResolvedModel,
    prepared_blocks: Blocks,
    pack_collator: PackCollator,
    implementation: str,
    masked: int,
    causal: int,
) -> None:
    """Per layer: varlen calls the causal kernel once for each of four samples, sdpa once with a mask of the pack."""
    llava = build_llava(resolved_model, seed=0, dtype=torch.float32, attn_implementation=implementation)
    (pack,) = collate_groups(prepared_blocks, pack_collator, [[0, 1, 2, 3]])
    with AttentionCalls() as calls, torch.inference_mode():
        PackLoss(llava)(**vars(pack))
    layers = llava.config.text_config.num_hidden_layers
    assert (calls.masked, calls.causal) == (layers * masked, layers * causal)


def test_model_that_runs_another_implementation_than_asked_for_is_refused(resolved_model: ResolvedModel) -> None:
    llava = build_llava(resolved_model, seed=0, dtype=torch.float32, attn_implementation="varlen")
    llava.set_attn_implementation({"text_config": "sdpa"})
    assert attn_mismatch(llava, "varlen") == "the language model runs sdpa instead of varlen"


def test_loss_from_logits_at_target_positions_equals_the_loss_from_the_logits_of_transformers(
    model: PackLoss, plain_llava: LlavaForConditionalGeneration, prepared_blocks: Blocks, pack_collator: PackCollator
) -> None:
    """transformers computes logits at all positions, and of all embedding rows."""
    (pack,) = collate_groups(prepared_blocks, pack_collator, [[5]])
    with torch.inference_mode():
        loss = model(**vars(pack)) / len(pack.labels)
        logits = plain_llava(input_ids=pack.input_ids, pixel_values=pack.pixel_values).logits[0, pack.target_positions]
    expected = torch.nn.functional.cross_entropy(logits[:, : trained_vocabulary(plain_llava)], pack.labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_added_embedding_rows_take_no_part_in_the_softmax(
    toy_model: Model, tmp_path: Path, prepared_blocks: Blocks, pack_collator: PackCollator
) -> None:
    """The reference model has no such rows. Gemma has a row for each of its tokens, and none for `<image>`."""
    tokenizer = AutoTokenizer.from_pretrained(toy_model.language.name)
    gemma = AutoModelForCausalLM.from_pretrained(toy_model.language.name)
    rows = tokenizer.convert_tokens_to_ids("<image>")  # the last token
    gemma.resize_token_embeddings(rows, mean_resizing=False)
    gemma.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    recipe = toy_model.model_copy(update={"language": Language(name=str(tmp_path))})
    model = PackLoss(build_llava(resolve_model(recipe), seed=0, dtype=torch.float32))
    (pack,) = collate_groups(prepared_blocks, pack_collator, [[5]])
    embeddings = model.llava.lm_head.weight
    assert (trained_vocabulary(model.llava), len(embeddings)) == (rows, -(-(rows + 1) // 64) * 64)
    with torch.no_grad():
        before = model(**vars(pack))
        embeddings[rows:] = 100.0
    loss = model(**vars(pack))
    loss.backward()
    assert torch.equal(before, loss.detach())
    assert embeddings.grad is not None
    assert not embeddings.grad[rows:].any()


def test_each_loss_token_counts_by_its_weight(
    model: PackLoss, prepared_blocks: Blocks, pack_collator: PackCollator
) -> None:
    samples = [prepared_blocks[0], prepared_blocks[1]]
    with torch.inference_mode():
        alone = [model(**vars(on_cpu(pack_collator.collate([sample])))) for sample in samples]
        weighted = model(**vars(on_cpu(pack_collator.collate(samples, [0.25, 0.5]))))
    torch.testing.assert_close(weighted, 0.25 * alone[0] + 0.5 * alone[1], rtol=1e-5, atol=1e-6)


def test_gradients_do_not_depend_on_packing(
    model: PackLoss, prepared_blocks: Blocks, pack_collator: PackCollator
) -> None:
    unpacked = [[number] for number in range(6)]
    expected_loss, expected = loss_and_gradients(model, collate_groups(prepared_blocks, pack_collator, unpacked))
    for groups in ([[0, 1, 2, 3, 4, 5]], [[5, 0], [3, 2, 4], [1]], [*unpacked, []]):
        loss, gradients = loss_and_gradients(model, collate_groups(prepared_blocks, pack_collator, groups))
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=2e-5, msg=name)


def test_pretraining_trains_the_connector_and_finetuning_also_the_language_model(model: PackLoss) -> None:
    set_trainable(model.llava, "pretrain")
    assert {name.startswith(CONNECTOR) for name in trainable_names(model.llava)} == {True}
    assert len(trainable_names(model.llava)) == 4
    set_trainable(model.llava, "finetune")
    frozen = {name for name, _ in model.llava.named_parameters()} - trainable_names(model.llava)
    assert frozen == {name for name, _ in model.llava.named_parameters() if name.startswith(VISION_TOWER)}


def test_connector_initialization_depends_only_on_its_seed(resolved_model: ResolvedModel) -> None:
    def initialize(seed: int) -> torch.Tensor:
        torch.manual_seed(len(os.urandom(1)) + seed * 31)  # the global state must not matter
        return build_llava(resolved_model, seed, torch.float32).model.multi_modal_projector.linear_1.weight

    assert torch.equal(initialize(1), initialize(1))
    assert not torch.equal(initialize(1), initialize(2))


def test_connector_of_other_widths_is_rejected_with_both_widths(
    tmp_path: Path, vision: VisionSpec, language: LanguageSpec
) -> None:
    weights = {f"{CONNECTOR}linear_1.weight": torch.zeros(8, 4), f"{CONNECTOR}linear_2.weight": torch.zeros(8, 8)}
    save_file(weights, tmp_path / CONNECTOR_FILE)
    with pytest.raises(UserError, match=r"it maps width 4 to 8, but .* has width 16"):
        validate_connector(str(tmp_path), vision, language)
    with pytest.raises(UserError, match="no raylava connector there"):
        validate_connector(str(tmp_path / "nowhere"), vision, language)


def test_connector_of_the_right_widths_replaces_random_initialization(
    tmp_path: Path, toy_model: Model, resolved_model: ResolvedModel
) -> None:
    trained = build_llava(resolved_model, seed=7, dtype=torch.float32).model.multi_modal_projector
    weights = {CONNECTOR + name: value for name, value in trained.state_dict().items()}
    save_connector(weights, trained.feature_factor, tmp_path / CONNECTOR_FILE)
    validate_connector(str(tmp_path), resolved_model.vision, resolved_model.language)
    with_connector = resolve_model(toy_model.model_copy(update={"connector": Connector(weights=str(tmp_path))}))
    loaded = build_llava(with_connector, seed=1, dtype=torch.float32).model.multi_modal_projector
    for name, value in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_connector_trained_together_with_the_vision_tower_brings_the_tower(
    tmp_path: Path, resolved_model: ResolvedModel
) -> None:
    """`pretrain.vision_lr` trains both, and the artifact holds both."""
    trained = build_llava(resolved_model, seed=7, dtype=torch.float32)
    set_trainable(trained, "pretrain", vision=True)
    with torch.no_grad():
        for parameter in trained.model.vision_tower.parameters():
            parameter.add_(0.5)
    weights = {name: value.detach().clone() for name, value in trained.named_parameters() if value.requires_grad}
    save_connector(weights, running_feature_factor(trained), tmp_path / CONNECTOR_FILE)
    loaded = build_llava(resolved_model, seed=1, dtype=torch.float32)
    load_connector(loaded, str(tmp_path))
    for name, value in loaded.named_parameters():
        if name in weights:
            assert torch.equal(value, weights[name]), name
    del weights[next(name for name in weights if name.startswith(VISION_TOWER))]
    save_file(weights, tmp_path / CONNECTOR_FILE)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_connector(loaded, str(tmp_path))


def test_new_image_token_gets_an_embedding_row_and_embeddings_stay_tied(resolved_model: ResolvedModel) -> None:
    tokenizer = load_tokenizer(resolved_model.language)
    llava = build_llava(resolved_model, seed=0, dtype=torch.float32)
    embeddings = llava.get_input_embeddings().weight
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    assert image_id < len(embeddings)
    assert llava.config.image_token_id == image_id
    assert llava.lm_head.weight is llava.model.language_model.embed_tokens.weight, "Gemma ties its embeddings"
