"""Export a model as a Hugging Face folder: weights, processor, chat template, generation config.

Plain transformers loads the folder without raylava; its processor computes the same pixels as preparation.
"""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from raylava.models.registry import LanguageSpec, ResolvedModel, VisionSpec, load_tokenizer
from raylava.models.templates import IMAGE_TOKEN
from raylava.storage import storage_path

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import (
        GenerationConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerBase,
    )


def export_model(
    llava: "LlavaForConditionalGeneration",
    weights: "dict[str, Tensor] | None",
    model: ResolvedModel,
    image_aspect: str,
    folder: Path,
) -> None:
    """Write the model to a local folder. `weights` replace the module's own; `image_aspect` is pad or crop."""
    tokenizer = load_tokenizer(model.language)
    llava.generation_config = generation_config(tokenizer, model.language)
    llava.save_pretrained(folder, state_dict=weights)
    build_processor(tokenizer, model.vision, model.language, image_aspect).save_pretrained(folder)


def export_untrained(model: ResolvedModel, seed: int, image_aspect: str, precision: str, output: str) -> None:
    """Write the model before any training to `output`: pretrained backbones, and the connector before training."""
    from raylava.models.llava import DTYPES, build_llava

    llava = build_llava(model, seed, DTYPES[precision])
    folder = Path(tempfile.mkdtemp(prefix="raylava-untrained-"))
    try:
        export_model(llava, None, model, image_aspect, folder)
        storage_path(output).upload_folder(folder)
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

    size = vision.pixels.size
    square = {"height": size, "width": size}
    image_processor = LlavaImageProcessorPil(
        do_pad=image_aspect == "pad",
        do_resize=True,
        size=square if image_aspect == "pad" else {"shortest_edge": size},
        do_center_crop=image_aspect == "crop",
        crop_size=square,
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
    tokenizer.init_kwargs |= {"padding_side": "left", "add_bos_token": False}
    return tokenizer
