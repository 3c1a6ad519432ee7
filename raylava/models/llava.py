"""Build LlavaForConditionalGeneration from two backbones, select what trains in each stage, compute a pack's loss.

Weights are loaded from safetensors only, and never with remote code. Nothing here depends on DeepSpeed or Ray.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from raylava.compat.transformers import running_attn_implementations
from raylava.config.recipe import StageName
from raylava.errors import UserError
from raylava.models.attention import VARLEN, register_varlen
from raylava.models.registry import (
    LanguageSpec,
    ResolvedModel,
    VisionSpec,
    backbone_path,
    load_tokenizer,
    padded_vocabulary,
)
from raylava.models.templates import IMAGE_TOKEN
from raylava.storage import storage_path

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by the recipe's `precision`
CONNECTOR = "model.multi_modal_projector."  # prefix of the connector's weight names
VISION_TOWER = "model.vision_tower."
CONNECTOR_FILE = "connector.safetensors"


@dataclass(frozen=True)
class PackTensors:
    """The model inputs of one pack: T tokens of several samples in one row, N images, S loss tokens.

    input_ids (1, T) int64, image tokens expanded; position_ids (1, T) int64, restarting at 0 with each sample;
    pixel_values (N, 3, size, size); target_positions (S,) int64, the positions whose next token is in the loss;
    labels (S,) int64; cu_seqlens (samples + 1,) int32, the start of each sample and T, which stays on the host.
    """

    input_ids: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    target_positions: Tensor
    labels: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "PackTensors":
        """Copy the tensors to the device, and cast pixels to the model's dtype."""
        return PackTensors(
            self.input_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.pixel_values.to(device, dtype, non_blocking=True),
            self.target_positions.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.cu_seqlens,
        )


class PackLoss(nn.Module):
    """The training forward pass: maps a pack to the sum of its loss tokens' cross-entropies (a scalar, fp32).

    Logits are computed at the target positions only. Samples of a pack do not attend to each other: `varlen` attention
    computes each sample separately; for other implementations transformers builds a block-diagonal mask from the
    restarting positions, which requires that no attention mask is passed and no cache is used.
    """

    def __init__(self, llava: "LlavaForConditionalGeneration") -> None:
        super().__init__()
        self.llava = llava
        self._varlen = running_attn_implementations(llava.model.language_model) == {VARLEN}

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        pixel_values: Tensor,
        target_positions: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor,
    ) -> Tensor:
        """Return the summed loss of a pack; the arguments are those of PackTensors."""
        logits = self.logits(input_ids, position_ids, pixel_values, target_positions, cu_seqlens)
        return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")

    def logits(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        pixel_values: Tensor,
        target_positions: Tensor,
        cu_seqlens: Tensor,
    ) -> Tensor:
        """Return the (S, vocabulary) logits at the target positions."""
        hidden = self.llava.model(
            input_ids=input_ids,
            position_ids=position_ids,
            pixel_values=pixel_values,
            use_cache=False,
            **({"cu_seqlens": cu_seqlens} if self._varlen else {}),
        ).last_hidden_state
        return self.llava.lm_head(hidden[0, target_positions])


def build_llava(
    model: ResolvedModel, seed: int, dtype: torch.dtype, attn_implementation: str = "sdpa"
) -> "LlavaForConditionalGeneration":
    """Load both backbones and initialize the connector from `seed`, or from the connector artifact that is named.

    `attn_implementation` is transformers' name of an implementation, or VARLEN.
    """
    from transformers import LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    tokenizer = load_tokenizer(model.language)
    tower = load_vision_tower(model.vision, dtype)
    language = _load_language_model(model.language, dtype)
    _resize_embeddings(language, len(tokenizer))
    config = _llava_config(tower, language, model.vision, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    with torch.device("meta"):  # the skeleton only: every part is replaced by a loaded one below
        llava = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llava.model.multi_modal_projector = LlavaMultiModalProjector(config).to(dtype)
    llava.model.vision_tower = tower
    llava.model.language_model = language.model
    llava.lm_head = language.lm_head
    llava.tie_weights()
    set_attn_implementation(llava, attn_implementation)
    if model.connector_weights:
        load_connector(llava, model.connector_weights)
    assert not any(parameter.is_meta for parameter in llava.parameters())
    return llava


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
    """Load the vision tower with its weights."""
    import transformers

    model_class = getattr(transformers, vision.model_class)
    return model_class.from_pretrained(
        backbone_path(vision.name),
        revision=vision.revision,
        dtype=dtype,
        use_safetensors=True,
    )


def _load_language_model(language: LanguageSpec, dtype: torch.dtype) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        backbone_path(language.name),
        revision=language.revision,
        dtype=dtype,
        use_safetensors=True,
    )


def _resize_embeddings(language: "PreTrainedModel", tokens: int) -> None:
    """Add embedding rows for new tokens, initialized to the mean of the old rows so that they are rarely generated."""
    rows = language.get_input_embeddings().weight.shape[0]
    if tokens <= rows:
        return
    language.resize_token_embeddings(padded_vocabulary(tokens, rows), mean_resizing=False)
    for embeddings in {language.get_input_embeddings(), language.get_output_embeddings()}:
        with torch.no_grad():
            mean = embeddings.weight[:rows].float().mean(dim=0)
            embeddings.weight[rows:] = mean.to(embeddings.weight.dtype)


def _llava_config(
    tower: "PreTrainedModel", language: "PreTrainedModel", vision: VisionSpec, image_token_id: int
) -> "LlavaConfig":
    from transformers import LlavaConfig

    return LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=image_token_id,
        image_seq_length=vision.image_tokens,
        vision_feature_layer=vision.feature_layer,
        vision_feature_select_strategy=vision.select_strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=language.config.tie_word_embeddings,
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


def load_connector(llava: "LlavaForConditionalGeneration", folder: str) -> None:
    """Put a connector artifact's weights into the model: the connector's, and the tower's if pretraining trained it.

    Raises RuntimeError when names or shapes differ.
    """
    weights = load_file(_connector_file(folder))
    tower = {name: value for name, value in weights.items() if name.startswith(VISION_TOWER)}
    connector = {name: value for name, value in weights.items() if name not in tower}
    for module, prefix, part in (
        (llava.model.multi_modal_projector, CONNECTOR, connector),
        (llava.model.vision_tower, VISION_TOWER, tower),
    ):
        if part or prefix == CONNECTOR:
            module.load_state_dict({name.removeprefix(prefix): value for name, value in part.items()}, strict=True)


def validate_connector(folder: str, vision: VisionSpec, language: LanguageSpec) -> None:
    """Raise UserError unless the connector artifact's widths match both backbones."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(_connector_file(folder), framework="pt") as file:
            first, second = (file.get_slice(f"{CONNECTOR}linear_{layer}.weight").get_shape() for layer in (1, 2))
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.connector.weights={folder}: no raylava connector there ({error})") from error
    vision_width, language_width = vision.shape.width, language.shape.width
    if first[1] != vision_width or second[0] != language_width:
        raise UserError(
            f"model.connector.weights={folder}: it maps width {first[1]} to {second[0]}, but {vision.name} has width "
            f"{vision_width} and {language.name} {language_width}; use a connector pretrained for this pair"
        )


def _connector_file(folder: str) -> Path:
    return storage_path(folder).local_copy() / CONNECTOR_FILE
