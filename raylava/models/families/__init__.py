"""The families of backbones: one module per family, listed here, and those of other installed packages.

A module's FAMILY holds all that raylava knows about the family: the class in transformers, the fields of config.json,
the layer that LLaVA reads, the chat template, dimensions for the analytic model, known hub ids. Modules import torch
and transformers inside functions, if at all. docs/extend.md shows how to add one, here or in a package of your own.
"""

from functools import cache
from importlib.metadata import entry_points

from raylava.models.families import clip, dinov2, gemma, siglip
from raylava.models.families.family import Family, LanguageFamily, VisionFamily

ENTRY_POINTS = "raylava.families"  # the group in which a package names its VisionFamily and LanguageFamily objects
_FAMILIES: list[VisionFamily | LanguageFamily] = [clip.FAMILY, dinov2.FAMILY, siglip.FAMILY, gemma.FAMILY]


def register(family: VisionFamily | LanguageFamily) -> None:
    """Add a family in this process. Workers need no registration: they receive resolved backbones.

    Raises ValueError when another family of the same kind has its name or one of its model types.
    """
    for other in _FAMILIES:
        if type(other) is not type(family):
            continue
        if other.name == family.name or set(other.model_types) & set(family.model_types):
            raise ValueError(f"family {family.name} has the name or a model type of {other.name}; choose others")
    _FAMILIES.append(family)


def vision_families() -> dict[str, VisionFamily]:
    """Return the vision families by name."""
    _load_plugins()
    return _of_kind(VisionFamily)


def language_families() -> dict[str, LanguageFamily]:
    """Return the language families by name."""
    _load_plugins()
    return _of_kind(LanguageFamily)


def _of_kind(kind: type[Family]) -> dict[str, Family]:
    return {family.name: family for family in _FAMILIES if isinstance(family, kind)}


@cache
def _load_plugins() -> None:
    for entry_point in entry_points(group=ENTRY_POINTS):
        register(entry_point.load())
