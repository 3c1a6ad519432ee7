"""The Hugging Face folder of a trained model: weights, processor, chat template, generation config.

Plain transformers loads it with no raylava import; its processor computes the pixels that training saw.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from raylava.models.registry import LanguageSpec, VisionSpec
from raylava.models.templates import IMAGE_TOKEN

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerBase,
    )


def publish(
    llava: "LlavaForConditionalGeneration",
    weights: dict[str, Tensor] | None,
    tokenizer: "PreTrainedTokenizerBase",
    vision: VisionSpec,
    language: LanguageSpec,
    fit: str,
    folder: Path,
) -> None:
    """Write the model to a local folder. `weights` replace the module's own; `fit` is pad or crop."""
    llava.generation_config = generation_config(tokenizer, language)
    llava.save_pretrained(folder, state_dict=weights)
    processor(tokenizer, vision, language, fit).save_pretrained(folder)


def generation_config(tokenizer: "PreTrainedTokenizerBase", language: LanguageSpec) -> "GenerationConfig":
    """Greedy, and stopping on the end of a turn as well as on the end of a text."""
    from transformers import GenerationConfig

    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(language.template.close)]
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )


def processor(
    tokenizer: "PreTrainedTokenizerBase", vision: VisionSpec, language: LanguageSpec, fit: str
) -> "LlavaProcessor":
    """Pixels by the same arithmetic as corpus/images.py, and one placeholder for each image token."""
    from transformers import LlavaImageProcessorPil, LlavaProcessor

    size = vision.pixels.size
    whole = {"height": size, "width": size}
    # Pillow's arithmetic, as in preparation. Where torchvision is installed, plain AutoProcessor takes its own
    # variant, whose
    # pixels differ a little, unless it is told backend="pil"; no file in the folder can say so (transformers 5.23).
    images = LlavaImageProcessorPil(
        do_pad=fit == "pad",
        do_resize=True,
        size=whole if fit == "pad" else {"shortest_edge": size},
        do_center_crop=fit == "crop",
        crop_size=whole,
        image_mean=list(vision.pixels.mean),
        image_std=list(vision.pixels.std),
    )
    return LlavaProcessor(
        images,
        _for_generation(tokenizer),
        patch_size=vision.patch_size,
        vision_feature_select_strategy=vision.select_strategy,
        num_additional_image_tokens=int(vision.has_cls),
        image_token=IMAGE_TOKEN,
        chat_template=language.template.jinja(),
    )


def _for_generation(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Pad on the left, as generation needs, and leave `<bos>` to the chat template, which writes it already."""
    from tokenizers.processors import Sequence

    tokenizer.padding_side = "left"
    tokenizer.backend_tokenizer.post_processor = Sequence([])
    tokenizer.init_kwargs |= {"padding_side": "left", "add_bos_token": False}
    return tokenizer
