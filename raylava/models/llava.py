"""Build LlavaForConditionalGeneration from two backbones, select what trains in each stage, compute a pack's loss.

Weights are loaded from safetensors only, and never with remote code. Nothing here depends on DeepSpeed or Ray.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from raylava.compat.transformers import running_attn_implementations
from raylava.config.recipe import StageName
from raylava.errors import UserError
from raylava.models.attention import VARLEN, register_varlen
from raylava.models.checkpoint import load_checkpoint, load_complete
from raylava.models.connector import (
    CONNECTOR,
    VISION_TOWER,
    feature_factor,
    load_connector,
    scale_last_layer,
)
from raylava.models.loss import LossHead
from raylava.models.packs import PackTensors
from raylava.models.registry import LanguageSpec, ResolvedModel, VisionSpec, load_tokenizer, padded_vocabulary
from raylava.models.templates import IMAGE_TOKEN
from raylava.perf.memory import loss_chunk_rows

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by the recipe's `precision`


class PackLoss(nn.Module):
    """The training forward pass: maps a pack to the weighted sum of its loss tokens' cross-entropies (a scalar, fp32).

    The loss is computed at the target positions only, in chunks of them. Embedding rows that were added to the language
    model's own take no part in the softmax: the reference model has none. Samples of a pack do not attend to each
    other: `varlen` attention computes each sample separately; for other implementations transformers builds a
    block-diagonal mask from the restarting positions, which requires that no attention mask is passed and no cache is
    used.
    """

    def __init__(self, llava: "LlavaForConditionalGeneration") -> None:
        super().__init__()
        if not isinstance(llava.lm_head, LossHead):
            assert llava.lm_head.bias is None, "no supported language model has a bias in its output layer"
            llava.lm_head = LossHead(llava.lm_head.weight)
        self.llava = llava
        self._vocabulary = trained_vocabulary(llava)
        self._varlen = running_attn_implementations(llava.model.language_model) == {VARLEN}

    def forward(self, **pack: Tensor) -> Tensor:
        """Return the weighted loss of a pack; the arguments are the fields of PackTensors."""
        tensors = PackTensors(**pack)
        hidden = self._hidden_states(tensors)
        loss: Tensor = self.llava.lm_head(hidden, tensors.labels, tensors.loss_weights, self._vocabulary)
        return loss

    def description(self) -> str:
        """Describe where logits are computed."""
        return f"at loss tokens, {loss_chunk_rows(self._vocabulary):,} at once"

    def logits(self, pack: PackTensors) -> Tensor:
        """Return the logits at the target positions: (S, vocabulary), without added embedding rows."""
        logits: Tensor = self.llava.lm_head(self._hidden_states(pack))
        return logits[:, : self._vocabulary]

    def _hidden_states(self, pack: PackTensors) -> Tensor:
        """Return the last hidden states at the target positions: (S, width)."""
        starts = {"cu_seqlens": pack.cu_seqlens, "device_cu_seqlens": pack.device_cu_seqlens}
        hidden: Tensor = self.llava.model.language_model(
            inputs_embeds=self._input_embeddings(pack),
            position_ids=pack.position_ids,
            use_cache=False,
            **(starts if self._varlen else {}),
        ).last_hidden_state
        return hidden[0, pack.target_positions]

    def _input_embeddings(self, pack: PackTensors) -> Tensor:
        """Return the embeddings of the tokens with those of images in their places: (1, T, width).

        transformers' own forward pass finds the places on the device, and waits for it to compare their number.
        """
        model = self.llava.model
        embeddings: Tensor = model.get_input_embeddings()(pack.input_ids)
        features = torch.cat(model.get_image_features(pixel_values=pack.pixel_values).pooler_output)
        return embeddings.index_copy(1, pack.image_positions, features.to(embeddings.dtype)[None])


def trained_vocabulary(llava: "LlavaForConditionalGeneration") -> int:
    """Return the embedding rows that take part in training: those that the language model had by itself.

    Of a model that `build_llava` has not built, all rows do.
    """
    return int(getattr(llava.config, "trained_vocabulary", llava.config.text_config.vocab_size))


class ScaledConnector(LlavaMultiModalProjector):
    """transformers' connector, whose output is multiplied by `feature_factor`."""

    def __init__(self, config: "LlavaConfig", feature_factor: float) -> None:
        super().__init__(config)
        self.feature_factor = feature_factor

    def forward(self, image_features: Tensor) -> Tensor:
        """Map (…, vision width) features to (…, language width)."""
        output: Tensor = super().forward(image_features)
        return output if self.feature_factor == 1.0 else output * self.feature_factor


def build_llava(
    model: ResolvedModel, seed: int, dtype: torch.dtype, attn_implementation: str = "sdpa"
) -> "LlavaForConditionalGeneration":
    """Load both backbones and initialize the connector from `seed`, or from the connector artifact that is named.

    `attn_implementation` is transformers' name of an implementation, or VARLEN.
    """
    from transformers import LlavaForConditionalGeneration

    tokenizer = load_tokenizer(model.language)
    tower, language, connector = _load_parts(model, dtype)
    scale = float(getattr(language.get_input_embeddings(), "embed_scale", 1.0))
    assert math.isclose(scale, model.language.embedding_scale, rel_tol=1e-2), (
        f"family {model.language.family}: embedding_scale={model.language.embedding_scale}, the model has {scale}"
    )
    _resize_embeddings(language, len(tokenizer), model.language.shape.vocabulary)
    config = _llava_config(tower, language, model, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    with torch.device("meta"):  # the skeleton only: every part is replaced by a loaded one below
        llava = LlavaForConditionalGeneration(config)
    factor = feature_factor(model, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llava.model.multi_modal_projector = ScaledConnector(config, factor).to(dtype)
    llava.model.vision_tower = tower
    llava.model.language_model = language.model
    llava.lm_head = language.lm_head
    llava.tie_weights()
    set_attn_implementation(llava, attn_implementation)
    if connector:
        llava.model.multi_modal_projector.load_state_dict(scale_last_layer(connector, 1.0 / factor))
    if model.connector_weights:
        load_connector(llava, model.connector_weights)
    assert not any(parameter.is_meta for parameter in llava.parameters())
    return llava


def _load_parts(
    model: ResolvedModel, dtype: torch.dtype
) -> "tuple[PreTrainedModel, PreTrainedModel, dict[str, Tensor]]":
    """Load the vision tower and the language model: from their own checkpoints, or from the LLaVA checkpoint.

    The third value is the LLaVA checkpoint's connector in fp32, in the convention of transformers ≥ 5.4; empty without.
    """
    if model.initial_weights is None:
        return load_vision_tower(model.vision, dtype), _load_language_model(model.language, dtype), {}
    llava, factor = load_checkpoint(model.initial_weights, dtype)
    connector = {name: value.float() for name, value in llava.model.multi_modal_projector.state_dict().items()}
    return llava.model.vision_tower, _causal_language_model(llava), scale_last_layer(connector, factor)


def _causal_language_model(llava: "LlavaForConditionalGeneration") -> "PreTrainedModel":
    """Return a LLaVA model's language model and output layer as a model for causal language modeling."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(llava.config.text_config)
    language.model, language.lm_head = llava.model.language_model, llava.lm_head
    return language


def set_attn_implementation(llava: "LlavaForConditionalGeneration", attn_implementation: str) -> None:
    """Set how attention is computed. Raises UserError when transformers runs another implementation instead.

    A backbone's own setting does not survive the assembly: LlavaConfig resets it in the backbone's config, and
    transformers ignores a wrong key of the dictionary.
    """
    register_varlen()
    vision = vision_attn_implementation(attn_implementation)
    llava.set_attn_implementation({"text_config": attn_implementation, "vision_config": vision})
    mismatch = attn_mismatch(llava, attn_implementation)
    if mismatch:
        raise UserError(
            f"attn_implementation={attn_implementation}: {mismatch}; install its package, or choose another"
        )


def attn_mismatch(llava: "LlavaForConditionalGeneration", attn_implementation: str) -> str:
    """Return which implementations run instead of the one that was asked for; empty if every layer runs that one."""
    parts = {
        "the language model": (llava.model.language_model, attn_implementation),
        "the vision tower": (llava.model.vision_tower, vision_attn_implementation(attn_implementation)),
    }
    return "; ".join(
        f"{name} runs {', '.join(sorted(running))} instead of {expected}"
        for name, (module, expected) in parts.items()
        if (running := running_attn_implementations(module)) != {expected}
    )


def vision_attn_implementation(attn_implementation: str) -> str:
    """Return the vision tower's implementation: that of the language model, and sdpa beside VARLEN, which is causal."""
    return "sdpa" if attn_implementation == VARLEN else attn_implementation


def load_vision_tower(vision: VisionSpec, dtype: torch.dtype) -> "PreTrainedModel":
    """Load the vision tower with its weights. Raises UserError like `load_complete`."""
    import transformers

    model_class = getattr(transformers, vision.model_class)
    return load_complete(model_class, vision.name, vision.revision, dtype, vision.other_parts)


def _load_language_model(language: LanguageSpec, dtype: torch.dtype) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    return load_complete(AutoModelForCausalLM, language.name, language.revision, dtype)


def _resize_embeddings(language: "PreTrainedModel", tokens: int, own_rows: int) -> None:
    """Add embedding rows for new tokens to the model's `own_rows`, initialized to their mean.

    They get no gradient; as a mean, they are rarely generated. Rows that a LLaVA checkpoint has added are replaced.
    """
    rows = padded_vocabulary(tokens, own_rows)
    if rows == language.get_input_embeddings().weight.shape[0] == own_rows:
        return
    language.resize_token_embeddings(rows, mean_resizing=False)
    for embeddings in {language.get_input_embeddings(), language.get_output_embeddings()}:
        with torch.no_grad():
            mean = embeddings.weight[:own_rows].float().mean(dim=0)
            embeddings.weight[own_rows:] = mean.to(embeddings.weight.dtype)


def _llava_config(
    tower: "PreTrainedModel", language: "PreTrainedModel", model: ResolvedModel, image_token_id: int
) -> "LlavaConfig":
    from transformers import LlavaConfig

    return LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=image_token_id,
        image_seq_length=model.vision.image_tokens,
        vision_feature_layer=model.vision.feature_layer,
        vision_feature_select_strategy=model.vision.select_strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=language.config.tie_word_embeddings,
        trained_vocabulary=model.language.shape.vocabulary,
    )


def set_trainable(llava: "LlavaForConditionalGeneration", stage: StageName, vision: bool = False) -> None:
    """Set requires_grad: the connector in pretraining, also the language model in finetuning, the tower if `vision`."""
    for name, parameter in llava.named_parameters():
        if name.startswith(CONNECTOR):
            trainable = True
        elif name.startswith(VISION_TOWER):
            trainable = vision
        else:
            trainable = stage == "finetune"
        parameter.requires_grad_(trainable)


def trainable_names(llava: "LlavaForConditionalGeneration") -> set[str]:
    """Return the names of the trainable weights."""
    return {name for name, parameter in llava.named_parameters() if parameter.requires_grad}
