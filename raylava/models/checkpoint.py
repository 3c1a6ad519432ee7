"""LLaVA checkpoints that other programs saved: loading them, and the scale of image features that they assume.

transformers before 5.4 multiplied image features by Gemma's embedding scale, since 5.4 it multiplies token embeddings
only. Nothing warns of it: a checkpoint that the older version saved answers as if its images were √width times fainter,
unless its connector's last layer is multiplied by the scale.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import InvalidVersion, Version
from safetensors import SafetensorError

from raylava.errors import UserError, first_line
from raylava.models.connector import scale_last_layer
from raylava.models.families import language_families, vision_families
from raylava.models.families.family import find_family
from raylava.models.hub import absolute_name, is_folder, pin_revision, read_json, weights_path
from raylava.models.registry import LlavaCheckpoint, ResolvedModel
from raylava.perf.shapes import LanguageShape, VisionShape
from raylava.storage import storage_path

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

_COMPUTED = ("rotary_emb.inv_freq", "position_ids")  # buffers that older versions of transformers saved
MIN_TRANSFORMERS = "5.4"  # the least version that scales token embeddings only


def find_checkpoint(name: str, transformers_version: str | None = None) -> LlavaCheckpoint:
    """Return the checkpoint in a folder or on the hub, at its current commit. Raises UserError when there is none."""
    if is_folder(name) and not (storage_path(name) / "config.json").exists():
        raise UserError(f"{name}: no model found (no config.json); give a finetune artifact or a Hugging Face folder")
    location = absolute_name(name)
    return LlavaCheckpoint(location, pin_revision(location, "main"), transformers_version)


def load_checkpoint(
    checkpoint: LlavaCheckpoint, dtype: "torch.dtype | str"
) -> "tuple[LlavaForConditionalGeneration, float]":
    """Load a LLaVA checkpoint; return it, and the factor that its connector's last layer is to be multiplied by.

    `dtype` is that of the weights; "auto" is the checkpoint's own. Raises UserError when the checkpoint cannot be read,
    lacks weights of its class (transformers would initialize them randomly), or does not say which version saved it.
    """
    from transformers import LlavaForConditionalGeneration

    scale = legacy_scale(checkpoint)
    llava = load_complete(LlavaForConditionalGeneration, checkpoint.name, checkpoint.revision, dtype)
    return llava, float(torch.tensor(scale).to(llava.dtype))


def complete_processor(processor: Any, checkpoint: LlavaCheckpoint) -> None:
    """Set what the processors of old checkpoints lack, from config.json and the families: token counts and template.

    transformers before 4.46 kept neither the patch size nor the rule of the class token in the processor, and the
    tokenizer's own chat template knows no images. What a processor has is left unchanged.
    """
    config = _read_config(checkpoint)
    text_config, vision_config = config["text_config"], config["vision_config"]
    language = find_family(language_families(), text_config.get("model_type"))
    vision = find_family(vision_families(), vision_config.get("model_type"))
    if processor.patch_size is None and vision:
        complete = vision.complete(vision_config)
        processor.patch_size = complete["patch_size"]
        processor.vision_feature_select_strategy = config.get("vision_feature_select_strategy", "default")
        processor.num_additional_image_tokens = int(vision.shape(complete, complete["image_size"]).has_cls)
    if processor.chat_template is None and language:
        processor.chat_template = language.template.jinja()


def load_complete(
    model_class: Any, name: str, revision: str, dtype: "torch.dtype | str", other_parts: tuple[str, ...] = ()
) -> Any:
    """Load a model of one of transformers' classes, from safetensors and without remote code.

    Raises UserError when a file cannot be read, and when weights are missing, have other shapes or have no place in the
    model: transformers initializes such weights randomly or leaves them out, and says so in a warning only. Weights
    whose names begin with one of `other_parts` may be left out.
    """
    try:
        model, loading = model_class.from_pretrained(
            weights_path(name, revision),
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{name}: its weights cannot be loaded ({first_line(error)}); give a complete model") from error
    model_name = type(model).__name__
    problems = {
        f"lacks {{}} weights of a {model_name}": loading["missing_keys"],
        f"has {{}} weights of other shapes than its config.json says of a {model_name}": [
            key for key, *_ in loading["mismatched_keys"]
        ],
        f"has {{}} weights that a {model_name} has not": [
            key for key in loading["unexpected_keys"] if not key.startswith(other_parts) and not key.endswith(_COMPUTED)
        ],
    }
    for problem, names in problems.items():
        if names:
            examples = ", ".join(sorted(names)[:3])
            raise UserError(f"{name}: {problem.format(len(names))}, {examples} among them; give a complete checkpoint")
    return model


def load_converted(checkpoint: LlavaCheckpoint, dtype: "torch.dtype | str") -> "LlavaForConditionalGeneration":
    """Load a LLaVA checkpoint so that today's transformers computes what it was trained to. See `load_checkpoint`."""
    llava, factor = load_checkpoint(checkpoint, dtype)
    connector = llava.model.multi_modal_projector
    connector.load_state_dict(scale_last_layer(connector.state_dict(), factor))
    return llava


def legacy_scale(checkpoint: LlavaCheckpoint) -> float:
    """Return the scale that the checkpoint's transformers version applied to image features, beyond today's: 1 if none.

    Raises UserError when there is no config.json, or none that states a version where the version matters.
    """
    config = _read_config(checkpoint)
    text_config = config["text_config"]
    family = find_family(language_families(), text_config.get("model_type"))
    scale = family.embedding_scale(family.complete(text_config)) if family else 1.0
    if scale == 1.0:
        return 1.0
    return scale if _saved_version(checkpoint, config) < Version(MIN_TRANSFORMERS) else 1.0


def _saved_version(checkpoint: LlavaCheckpoint, config: dict[str, Any]) -> Version:
    given = checkpoint.transformers_version
    try:
        return Version(str(given or config.get("transformers_version")))
    except InvalidVersion:
        if given:
            raise UserError(f"transformers_version={given}: not a version; give one such as 4.39") from None
        raise UserError(
            f"{checkpoint.name}: its config.json does not say which transformers version saved it, and versions before "
            f"{MIN_TRANSFORMERS} scaled image features; give the version as transformers_version"
        ) from None


def validate_checkpoint(model: ResolvedModel) -> None:
    """Raise UserError unless the model's initial weights are a LLaVA of the shapes of its two backbones."""
    checkpoint = model.initial_weights
    assert checkpoint is not None
    legacy_scale(checkpoint)
    config = _read_config(checkpoint)
    shapes = {
        f"model.language.name={model.language.name}": (_language_shape(config, model), model.language.shape),
        f"model.vision.name={model.vision.name}": (_vision_shape(config, model), model.vision.shape),
    }
    for key, (found, expected) in shapes.items():
        if found != expected:
            name = checkpoint.name
            raise UserError(f"model.initial_weights.name={name}: has other dimensions than {key}; change one of them")


def _language_shape(config: dict[str, Any], model: ResolvedModel) -> LanguageShape:
    """Return the dimensions of the checkpoint's language model, without the embedding rows that it has added."""
    family = language_families()[model.language.family]
    return replace(family.shape(family.complete(config["text_config"])), vocabulary=model.language.shape.vocabulary)


def _vision_shape(config: dict[str, Any], model: ResolvedModel) -> VisionShape:
    family = vision_families()[model.vision.family]
    return family.shape(family.complete(config["vision_config"]), model.vision.pixels.size)


def _read_config(checkpoint: LlavaCheckpoint) -> dict[str, Any]:
    config = read_json(checkpoint.name, checkpoint.revision, "config.json")
    if config is None or not isinstance(config.get("text_config"), dict) or "vision_config" not in config:
        raise UserError(f"{checkpoint.name}: no config.json of a LLaVA model there; give a Hugging Face LLaVA folder")
    return config
