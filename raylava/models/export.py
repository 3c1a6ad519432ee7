"""Export a model as a Hugging Face folder: weights, processor, chat template, generation config, model card.

Plain transformers (≥ 5.4) loads the folder without raylava; its processor computes the same pixels as preparation.
Weights have the names of published LLaVA checkpoints, so that vLLM and older versions of transformers find all of them.
No file holds a path of the machine that wrote it.
"""

import copy
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from raylava.artifacts import publish_folder
from raylava.models.checkpoint import MIN_TRANSFORMERS
from raylava.models.hub import is_folder
from raylava.models.registry import LanguageSpec, ResolvedModel, VisionSpec, load_tokenizer
from raylava.models.templates import IMAGE_TOKEN
from raylava.storage import storage_path

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import (
        GenerationConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerBase,
    )

_MODEL_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
{base_model}---

# LLaVA

A `LlavaForConditionalGeneration` trained with raylava. Language model: {language}. Vision backbone: {vision}.

It needs transformers {minimum} or newer. Older versions multiply image features by the language model's embedding
scale, which is folded into this model's connector: they load it without a warning and answer wrongly.
"""


def export_model(
    llava: "LlavaForConditionalGeneration",
    weights: "dict[str, Tensor] | None",
    model: ResolvedModel,
    image_aspect: str,
    folder: Path,
) -> None:
    """Write the model to a local folder. `weights` replace the module's own; `image_aspect` is pad or crop.

    The factor by which the model multiplies its connector's output is folded into the connector's last layer, in fp32.
    """
    tokenizer = load_tokenizer(model.language)
    llava.generation_config = generation_config(tokenizer, model.language)
    llava.save_pretrained(folder, state_dict=export_weights(llava, weights, model))
    _export_config(llava).save_pretrained(folder)
    build_processor(tokenizer, model.vision, model.language, image_aspect).save_pretrained(folder)
    (folder / "README.md").write_text(_model_card(model), encoding="utf-8")


def export_weights(
    llava: "LlavaForConditionalGeneration", weights: "dict[str, Tensor] | None", model: ResolvedModel
) -> "dict[str, Tensor]":
    """Return the weights of an exported folder: folded, in the model's dtype, by names for `save_pretrained`.

    `save_pretrained` renames weights to the names of checkpoints on the hub, but leaves out the vision family's prefix.
    """
    from raylava.models.connector import VISION_TOWER, running_feature_factor, scale_last_layer

    own = {name: value.detach() for name, value in llava.named_parameters()}  # tied weights come once
    scaled = scale_last_layer(own if weights is None else weights, running_feature_factor(llava))
    prefix = VISION_TOWER + model.vision.hub_prefix
    return {name.replace(VISION_TOWER, prefix): scaled[name].to(value.dtype) for name, value in own.items()}


def _export_config(llava: "LlavaForConditionalGeneration") -> "LlavaConfig":
    """Return the model's config without the paths of its backbones, with its dtype and the least transformers."""
    exported = copy.deepcopy(llava.config)
    exported.dtype = llava.dtype
    for part in (exported, exported.text_config, exported.vision_config):
        part.name_or_path = ""
    exported.architectures = ["LlavaForConditionalGeneration"]
    exported.min_transformers_version = MIN_TRANSFORMERS
    return exported


def _model_card(model: ResolvedModel) -> str:
    names = [model.language.name, model.vision.name]
    hub_ids = [name for name in names if not is_folder(name)]
    base_model = "".join(f"- {name}\n" for name in hub_ids)
    language, vision = ("a local folder" if is_folder(name) else name for name in names)
    return _MODEL_CARD.format(
        base_model=f"base_model:\n{base_model}" if hub_ids else "",
        language=language,
        vision=vision,
        minimum=MIN_TRANSFORMERS,
    )


def export_untrained(model: ResolvedModel, seed: int, image_aspect: str, precision: str, output: str) -> None:
    """Write the model before any training to `output`: pretrained backbones, and the connector before training."""
    from raylava.models.llava import DTYPES, build_llava

    llava = build_llava(model, seed, DTYPES[precision])
    folder = Path(tempfile.mkdtemp(prefix="raylava-untrained-"))
    try:
        export_model(llava, None, model, image_aspect, folder)
        publish_folder(folder, storage_path(output))
    finally:
        shutil.rmtree(folder)


def generation_config(tokenizer: "PreTrainedTokenizerBase", language: LanguageSpec) -> "GenerationConfig":
    """Return a greedy config that stops at the end of a turn as well as at the end of the text."""
    from transformers import GenerationConfig

    stop_ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(language.template.close)]
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )


def build_processor(
    tokenizer: "PreTrainedTokenizerBase", vision: VisionSpec, language: LanguageSpec, image_aspect: str
) -> "LlavaProcessor":
    """Return the processor whose pixels equal those of corpus/images.py, with one placeholder per image token.

    It uses Pillow, as preparation does. Where torchvision is installed, AutoProcessor selects a torchvision variant
    whose pixels differ slightly unless it is given backend="pil"; no file in the folder can request that
    (transformers 5.23).
    """
    from transformers import LlavaImageProcessorPil, LlavaProcessor

    size, resized = vision.pixels.size, vision.pixels.resized
    image_processor = LlavaImageProcessorPil(
        do_pad=image_aspect == "pad",
        do_resize=True,
        size={"height": resized, "width": resized} if image_aspect == "pad" else {"shortest_edge": resized},
        do_center_crop=image_aspect == "crop" or resized > size,
        crop_size={"height": size, "width": size},
        image_mean=list(vision.pixels.mean),
        image_std=list(vision.pixels.std),
    )
    return LlavaProcessor(
        image_processor,
        _configure_for_generation(tokenizer),
        patch_size=vision.shape.patch,
        vision_feature_select_strategy=vision.select_strategy,
        num_additional_image_tokens=int(vision.has_cls),
        image_token=IMAGE_TOKEN,
        chat_template=language.template.jinja(),
    )


def _configure_for_generation(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Pad on the left, as generation requires, and do not add `<bos>`, which the chat template writes already."""
    from tokenizers.processors import Sequence

    tokenizer.padding_side = "left"
    tokenizer.backend_tokenizer.post_processor = Sequence([])
    tokenizer.init_kwargs |= {"padding_side": "left", "add_bos_token": False, "name_or_path": ""}
    tokenizer.name_or_path = ""
    return tokenizer
