"""The connector: Linear → GELU → Linear, the scale of its output, and its weights in files.

LLaVA-Gemma's code passed image features and token embeddings through Gemma's embedding scale (√width) together;
transformers ≥ 5.4 scales token embeddings only. Training therefore multiplies the connector's output by the scale, and
an export folds it into the last layer. A connector file holds the weights as trained; its metadata states the factor.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from raylava.errors import UserError
from raylava.local_copies import local_copy
from raylava.models.registry import LanguageSpec, ResolvedModel, VisionSpec
from raylava.storage import storage_path

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

CONNECTOR = "model.multi_modal_projector."  # prefix of the connector's weight names
VISION_TOWER = "model.vision_tower."
CONNECTOR_FILE = "connector.safetensors"
TRAINED_CONNECTOR = "connector"  # folder of a finetune artifact with its connector as trained, which is not exported
_LAST_LAYER = ("linear_2.weight", "linear_2.bias")
_FACTOR = "feature_factor"  # metadata key: the number by which training multiplied the connector's output


def feature_factor(model: ResolvedModel, dtype: torch.dtype) -> float:
    """Return the factor of the connector's output in training.

    It is the language model's embedding scale rounded to `dtype`, as transformers rounds it for token embeddings: 55.5
    instead of 55.43 for Gemma 7B in bf16.
    """
    scale = model.language.embedding_scale if model.feature_scale == "embedding" else 1.0
    return float(torch.tensor(scale).to(dtype))


def running_feature_factor(llava: "LlavaForConditionalGeneration") -> float:
    """Return the factor by which a model multiplies its connector's output: 1 for a model of plain transformers."""
    return float(getattr(llava.model.multi_modal_projector, "feature_factor", 1.0))


def scale_last_layer(weights: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Return the weights with the connector's last layer (weight and bias) multiplied by `factor`, computed in fp32.

    Names are those of LlavaForConditionalGeneration's state, or of the connector's. Dtypes do not change.
    """
    scaled = dict(weights)
    for name, value in weights.items():
        if name.removeprefix(CONNECTOR) in _LAST_LAYER and factor != 1.0:
            scaled[name] = (value.float() * factor).to(value.dtype)
    return scaled


def save_connector(weights: Mapping[str, Tensor], factor: float, file: Path) -> None:
    """Write a connector's weights as trained, and the factor by which training multiplied its output."""
    tensors = {name: value.contiguous() for name, value in weights.items()}
    save_file(tensors, file, metadata={"format": "pt", _FACTOR: repr(factor)})


def load_connector(llava: "LlavaForConditionalGeneration", folder: str) -> None:
    """Put a connector artifact's weights into the model: the connector's, and the tower's if pretraining trained it.

    If the artifact was trained with another factor than the model has, the last layer is scaled so that image features
    are the same. Raises RuntimeError when names or shapes differ.
    """
    file = _connector_file(folder)
    weights = load_file(file)
    tower = {name: value for name, value in weights.items() if name.startswith(VISION_TOWER)}
    connector = {name: value for name, value in weights.items() if name not in tower}
    connector = scale_last_layer(connector, connector_factor(file) / running_feature_factor(llava))
    for module, prefix, part in (
        (llava.model.multi_modal_projector, CONNECTOR, connector),
        (llava.model.vision_tower, VISION_TOWER, tower),
    ):
        if part or prefix == CONNECTOR:
            module.load_state_dict({name.removeprefix(prefix): value for name, value in part.items()}, strict=True)


def connector_factor(file: Path) -> float:
    """Return the factor with which the connector in a file was trained, 1 where the file does not state it."""
    with safe_open(file, framework="pt") as content:
        return float((content.metadata() or {}).get(_FACTOR, 1.0))


def validate_connector(folder: str, vision: VisionSpec, language: LanguageSpec) -> None:
    """Raise UserError unless the connector artifact's widths match both backbones."""
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
    return local_copy(storage_path(folder)) / CONNECTOR_FILE
