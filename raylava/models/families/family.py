"""What a family module fills in: all that raylava must know about a kind of backbone, as data and one function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from raylava.models.templates import Template
from raylava.perf.shapes import LanguageShape, VisionShape

Config = Mapping[str, Any]  # the content of a config.json


@dataclass(frozen=True)
class PublishedVision:
    """A published backbone: its config.json, and the side in pixels of the images that its processor produces."""

    config: Config
    image_size: int


@dataclass(frozen=True)
class VisionFamily:
    """A kind of vision backbone.

    `model_types` are its values of `model_type` in config.json, also of configs that contain it as `vision_config`;
    `model_class` is the name of a class in transformers. `defaults` are the fields that config.json may omit. `shape`
    maps a complete config and the side of the input images in pixels to dimensions. LLaVA reads `feature_layer` of the
    tower's hidden states. Of an `only_own_image_size` family, transformers accepts no other size than config.json's.
    `hub_prefix` stands before the names of the tower's weights in LLaVA checkpoints on the hub, within
    `vision_tower.`; `raylava.models.export` adds it. `other_parts` begin the names of weights that a checkpoint may
    have beside those of the tower; any other weight without a place in the tower is an error.
    """

    name: str
    model_types: tuple[str, ...]
    model_class: str
    defaults: Config
    shape: Callable[[Config, int], VisionShape]
    feature_layer: int = -2
    only_own_image_size: bool = False
    hub_prefix: str = ""
    other_parts: tuple[str, ...] = ()
    published: Mapping[str, PublishedVision] = field(default_factory=dict)

    def complete(self, config: Config) -> dict[str, Any]:
        """Return the tower's config with omitted fields added; `config` is the tower's or contains it."""
        return {**self.defaults, **config.get("vision_config", config)}


@dataclass(frozen=True)
class LanguageFamily:
    """A kind of language model: see VisionFamily. `published` maps hub ids to configs.

    `embedding_scale` maps a complete config to the factor that the model applies to its token embeddings.
    """

    name: str
    model_types: tuple[str, ...]
    template: Template
    defaults: Config
    shape: Callable[[Config], LanguageShape]
    embedding_scale: Callable[[Config], float] = lambda config: 1.0
    published: Mapping[str, Config] = field(default_factory=dict)

    def complete(self, config: Config) -> dict[str, Any]:
        """Return the config with omitted fields added."""
        return {**self.defaults, **config}


Family = TypeVar("Family", VisionFamily, LanguageFamily)


def find_family(families: Mapping[str, Family], model_type: object) -> Family | None:
    """Return the family that has this `model_type` of a config.json, None if none has."""
    return next((family for family in families.values() if model_type in family.model_types), None)


def vision_transformer_shape(
    config: Config, pixels: int, *, intermediate: int, has_cls: bool, patch_bias: bool = True, extra: int = 0
) -> VisionShape:
    """Return the dimensions of a vision transformer with a position embedding per patch and class token.

    `pixels` is the side of its input images; the other arguments are fields of VisionShape.
    """
    patch = config["patch_size"]
    return VisionShape(
        width=config["hidden_size"],
        intermediate=intermediate,
        layers=config["num_hidden_layers"],
        patch=patch,
        patches=(pixels // patch) ** 2,
        positions=(config["image_size"] // patch) ** 2 + has_cls,
        has_cls=has_cls,
        patch_bias=patch_bias,
        extra=extra,
    )


def select_strategy(shape: VisionShape) -> str:
    """Return transformers' name of the class token's rule: `default` drops the first token, `full` keeps all."""
    return "default" if shape.has_cls else "full"
