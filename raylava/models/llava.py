"""Assemble LlavaForConditionalGeneration from two backbones; say what trains when; compute the loss of a pack.

Weights come from safetensors only, and never with remote code. Knows nothing of DeepSpeed or Ray.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from raylava.config.recipe import Model
from raylava.errors import UserError
from raylava.models.attention import VARLEN, register
from raylava.models.registry import (
    FEATURE_LAYER,
    VISION_FAMILIES,
    LanguageSpec,
    VisionSpec,
    backbone_path,
    load_tokenizer,
    vocabulary_for,
)
from raylava.models.templates import IMAGE_TOKEN

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

StageName = Literal["pretrain", "finetune"]
CONNECTOR = "model.multi_modal_projector."  # the names of the connector's weights start so
VISION_TOWER = "model.vision_tower."
CONNECTOR_FILE = "connector.safetensors"


@dataclass(frozen=True)
class PackTensors:
    """One pack, ready for the model: T tokens of several samples in one row, N images, S supervised tokens.

    input_ids (1, T) int64, image tokens expanded; position_ids (1, T) int64, restarting at 0 with each sample;
    pixel_values (N, 3, size, size); `target_positions` (S,) int64 positions whose next token is supervised; `labels` (S,) int64;
    `cu_seqlens` (samples + 1,) int32, where each sample starts, and T: it stays on the host.
    """

    input_ids: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    target_positions: Tensor
    labels: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "PackTensors":
        """On the device, pixels in the model's floating type."""
        return PackTensors(
            self.input_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.pixel_values.to(device, dtype, non_blocking=True),
            self.target_positions.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.cu_seqlens,
        )


class PackLoss(nn.Module):
    """LLaVA as training sees it: a pack in, the sum of the supervised tokens' cross-entropies out (a scalar, fp32).

    Logits are computed at the kept positions only. Samples of a pack don't see each other: with `varlen` attention each
    is attended to by itself, with any other transformers masks them apart where positions restart, provided that no
    attention mask is passed and no cache is used.
    """

    def __init__(self, llava: "LlavaForConditionalGeneration") -> None:
        super().__init__()
        self.llava = llava
        self._varlen = llava.config.text_config._attn_implementation == VARLEN

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        pixel_values: Tensor,
        target_positions: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor,
    ) -> Tensor:
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
        """(S, vocabulary) logits at the kept positions."""
        hidden = self.llava.model(
            input_ids=input_ids,
            position_ids=position_ids,
            pixel_values=pixel_values,
            use_cache=False,
            **({"cu_seqlens": cu_seqlens} if self._varlen else {}),
        ).last_hidden_state
        return self.llava.lm_head(hidden[0, target_positions])


def build_llava(
    model: Model, vision: VisionSpec, seed: int, dtype: torch.dtype, attention: str = "sdpa"
) -> "LlavaForConditionalGeneration":
    """Both backbones with their weights and a connector drawn from `seed`, or read from `model.connector.weights`.

    `attention` is transformers' name of an implementation, or VARLEN, which the vision tower has no use for.
    """
    from transformers import LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    tokenizer = load_tokenizer(model.language)
    tower = load_vision(model, vision, dtype, "sdpa" if attention == VARLEN else attention)
    language = _load_language(model, dtype, attention)
    _resize_embeddings(language, len(tokenizer))
    config = _config(tower, language, vision, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    with torch.device("meta"):  # only the frame: every part of it is replaced by a real one below
        llava = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llava.model.multi_modal_projector = LlavaMultiModalProjector(config).to(dtype)
    llava.model.vision_tower = tower
    llava.model.language_model = language.model
    llava.lm_head = language.lm_head
    llava.tie_weights()
    if model.connector.weights:
        load_connector(llava, model.connector.weights)
    assert not any(parameter.is_meta for parameter in llava.parameters())
    return llava


def load_vision(model: Model, vision: VisionSpec, dtype: torch.dtype, attention: str = "sdpa") -> "PreTrainedModel":
    """The vision tower with its weights."""
    import transformers

    model_class = getattr(transformers, VISION_FAMILIES[vision.family].model_class)
    return model_class.from_pretrained(
        backbone_path(model.vision.name),
        revision=model.vision.revision,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
    )


def _load_language(model: Model, dtype: torch.dtype, attention: str) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    register()
    return AutoModelForCausalLM.from_pretrained(
        backbone_path(model.language.name),
        revision=model.language.revision,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
    )


def _resize_embeddings(language: "PreTrainedModel", tokens: int) -> None:
    """Add embedding rows for new tokens. They start at the mean of the old, so that none is likely to be generated."""
    old = language.get_input_embeddings().weight.shape[0]
    if tokens <= old:
        return
    language.resize_token_embeddings(vocabulary_for(tokens, old), mean_resizing=False)
    for table in {language.get_input_embeddings(), language.get_output_embeddings()}:
        with torch.no_grad():
            table.weight[old:] = table.weight[:old].float().mean(dim=0).to(table.weight.dtype)


def _config(
    tower: "PreTrainedModel", language: "PreTrainedModel", vision: VisionSpec, image_token_id: int
) -> "LlavaConfig":
    from transformers import LlavaConfig

    return LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=image_token_id,
        image_seq_length=vision.image_tokens,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy=vision.select_strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=language.config.tie_word_embeddings,
    )


def set_trainable(llava: "LlavaForConditionalGeneration", stage: StageName, vision: bool = False) -> None:
    """Pretraining trains the connector; finetuning the connector and the language model; the tower if `vision`."""
    for name, parameter in llava.named_parameters():
        if name.startswith(CONNECTOR):
            trains = True
        elif name.startswith(VISION_TOWER):
            trains = vision
        else:
            trains = stage == "finetune"
        parameter.requires_grad_(trains)


def trainable_names(llava: "LlavaForConditionalGeneration") -> set[str]:
    """Names of the weights that train now."""
    return {name for name, parameter in llava.named_parameters() if parameter.requires_grad}


def load_connector(llava: "LlavaForConditionalGeneration", folder: str) -> None:
    """Put a connector artifact's weights in place, strictly."""
    connector = llava.model.multi_modal_projector
    weights = load_file(_connector_file(folder))
    connector.load_state_dict({name.removeprefix(CONNECTOR): value for name, value in weights.items()}, strict=True)


def check_connector(folder: str, vision: VisionSpec, language: LanguageSpec) -> None:
    """Raise UserError unless the connector artifact's widths fit both backbones."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(_connector_file(folder), framework="pt") as file:
            inner, outer = (file.get_slice(f"{CONNECTOR}linear_{layer}.weight").get_shape() for layer in (1, 2))
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.connector.weights={folder}: no raylava connector there ({error})") from error
    if inner[1] != vision.width or outer[0] != language.width:
        raise UserError(
            f"model.connector.weights={folder}: it joins widths {inner[1]} → {outer[0]}, but {vision.name} is "
            f"{vision.width} wide and {language.name} {language.width}; use a connector pretrained for this pair"
        )


def _connector_file(folder: str) -> Path:
    from raylava.storage import storage_path

    return storage_path(folder).local_copy() / CONNECTOR_FILE
