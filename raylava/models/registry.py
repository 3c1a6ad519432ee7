"""The resolution of a recipe's backbones.

A recipe names a backbone by hub id or folder; `resolve_model` turns these names into a ResolvedModel, which is
serializable and passed to every stage. Only configuration files are read here; llava.py loads weights.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from raylava.config.recipe import InitialWeights, Language, Model, Vision
from raylava.errors import UserError, first_line
from raylava.models.families import language_families, vision_families
from raylava.models.families.family import Family, LanguageFamily, VisionFamily, find_family, select_strategy
from raylava.models.hub import has_tokenizer, is_folder, model_path, pin_revision, read_json
from raylava.models.templates import IMAGE_TOKEN, Template
from raylava.perf.shapes import LanguageShape, LlavaShape, VisionShape
from raylava.storage import storage_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARY_MULTIPLE = 64  # added embedding rows are padded to a multiple of this, for efficient matrix products
_TOY_FOLDER = "toy/"  # below which the shipped toy recipes expect their backbones


@dataclass(frozen=True)
class PixelRule:
    """How an image becomes the backbone's input: `size` in pixels per side; mean and std per RGB channel, in [0, 1].

    The image is resized to `resize_size` pixels per side (its short side, if it is not padded to a square), and its
    center of `size` pixels is cropped; None stands for `size`.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize_size: int | None = None

    @property
    def resized(self) -> int:
        """The side of the image in pixels before it is cropped."""
        return self.resize_size or self.size


@dataclass(frozen=True)
class VisionSpec:
    """A resolved vision backbone: what its family says of it, for images of the recipe's size.

    `model_class` is the name of a class in transformers, `feature_layer` the index of the hidden states that LLaVA
    reads, `hub_prefix` stands before the names of its weights in checkpoints on the hub, `other_parts` begin the names
    of those that are not the tower's.
    """

    name: str
    revision: str
    family: str
    pixels: PixelRule
    shape: VisionShape
    model_class: str
    feature_layer: int
    hub_prefix: str = ""
    other_parts: tuple[str, ...] = ()

    @property
    def has_cls(self) -> bool:
        """Whether the hidden states begin with a class token, which LLaVA drops."""
        return self.shape.has_cls

    @property
    def image_tokens(self) -> int:
        """Tokens that one image occupies in the language model's sequence."""
        return self.shape.patches

    @property
    def select_strategy(self) -> str:
        """transformers' name of the class token's rule, see families.family.select_strategy."""
        return select_strategy(self.shape)

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return what determines prepared blocks: pixels and token count, not weights."""
        return {"pixels": asdict(self.pixels), "image_tokens": self.image_tokens}


@dataclass(frozen=True)
class LanguageSpec:
    """A resolved language model. `shape` has the embedding rows of its config.json.

    `embedding_scale` is the factor that the model applies to its token embeddings.
    """

    name: str
    revision: str
    family: str
    template: Template
    shape: LanguageShape
    embedding_scale: float = 1.0


@dataclass(frozen=True)
class LlavaCheckpoint:
    """A LLaVA checkpoint, and the transformers version that saved it if its config.json does not state it correctly."""

    name: str
    revision: str = "main"
    transformers_version: str | None = None


@dataclass(frozen=True)
class ResolvedModel:
    """The model of a recipe with its backbones resolved: all that stages need to know about it, serializable.

    `connector_weights` is the location of a connector artifact that replaces random initialization, `initial_weights`
    a LLaVA checkpoint that replaces all of the backbones' weights. `feature_scale` is that of the recipe.
    """

    language: LanguageSpec
    vision: VisionSpec
    connector_weights: str | None = None
    feature_scale: Literal["embedding", "none"] = "embedding"
    initial_weights: LlavaCheckpoint | None = None

    def shape(self, vocabulary: int) -> LlavaShape:
        """Return the dimensions of the model whose embedding has been resized to `vocabulary` rows."""
        return LlavaShape(replace(self.language.shape, vocabulary=vocabulary), self.vision.shape)


def validate_backbones(language: Language, vision: Vision) -> None:
    """Refuse an unknown backbone without network access or weights. Raises UserError."""
    _validate_family(vision.name, vision.family, vision_families(), "vision")
    _validate_family(language.name, language.family, language_families(), "language")


def resolve_model(model: Model) -> ResolvedModel:
    """Resolve both backbones from their configuration files, and hub revisions to commits.

    Raises UserError when a backbone is missing or unsupported.
    """
    initial = model.initial_weights
    return ResolvedModel(
        resolve_language(model.language),
        resolve_vision(model.vision),
        model.connector.weights,
        model.connector.feature_scale,
        resolve_checkpoint(initial) if initial else None,
    )


def resolve_checkpoint(checkpoint: InitialWeights) -> LlavaCheckpoint:
    """Pin a LLaVA checkpoint's hub revision. Raises UserError when the hub cannot be reached."""
    commit = pin_revision(checkpoint.name, checkpoint.revision)
    return LlavaCheckpoint(checkpoint.name, commit, checkpoint.transformers_version)


def resolve_vision(vision: Vision) -> VisionSpec:
    """Resolve a vision backbone from its config and preprocessor files. Raises UserError when it is unsupported."""
    vision = vision.model_copy(update={"revision": pin_revision(vision.name, vision.revision)})
    family, config = read_vision(vision)
    return vision_spec(vision, family, config, read_pixels(vision, family, config))


def read_pixels(vision: Vision, family: VisionFamily, config: Mapping[str, Any]) -> PixelRule:
    """Return the pixel rule of a backbone's preprocessor, at the recipe's image size. Raises UserError."""
    processor = read_json(vision.name, vision.revision, "preprocessor_config.json")
    if processor is None:
        raise UserError(f"model.vision.name={vision.name}: has no preprocessor_config.json; give a folder that has one")
    with _named_config(vision.name, "vision", "preprocessor_config.json"):
        size = int(vision.image_size or _processor_size(processor) or config["image_size"])
        mean, std = (tuple(float(value) for value in processor[key]) for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"image_mean and image_std have {len(mean)} and {len(std)} values, not 3")
    _validate_image_size(vision, family, size, config)
    if vision.resize_size and vision.resize_size < size:
        raise UserError(f"model.vision.resize_size={vision.resize_size} is less than the image size, {size}; raise it")
    return PixelRule(size, mean, std, vision.resize_size)


def vision_spec(vision: Vision, family: VisionFamily, config: Mapping[str, Any], pixels: PixelRule) -> VisionSpec:
    """Return the spec of a backbone whose complete config and pixel rule are known."""
    shape = family.shape(config, pixels.size)
    return VisionSpec(
        vision.name,
        vision.revision,
        family.name,
        pixels,
        shape,
        family.model_class,
        family.feature_layer,
        family.hub_prefix,
        family.other_parts,
    )


def _validate_image_size(vision: Vision, family: VisionFamily, size: int, config: Mapping[str, Any]) -> None:
    patch, own_size = config["patch_size"], config["image_size"]
    if size % patch:
        raise UserError(
            f"model.vision.image_size={size} is not a multiple of {vision.name}'s patch size {patch}; "
            f"try {size // patch * patch}"
        )
    if family.only_own_image_size and size != own_size:
        raise UserError(f"model.vision.image_size={size}: {vision.name} takes {own_size} only; leave it out")


def resolve_language(language: Language) -> LanguageSpec:
    """Resolve a language model from its config.json. Raises UserError when it is missing or of an unknown family."""
    revision = pin_revision(language.name, language.revision)
    family, config = read_language(language.model_copy(update={"revision": revision}))
    scale = family.embedding_scale(config)
    return LanguageSpec(language.name, revision, family.name, family.template, family.shape(config), scale)


def read_vision(vision: Vision) -> tuple[VisionFamily, dict[str, Any]]:
    """Return a vision backbone's family and the complete config of its tower. Raises UserError."""
    config = read_config(vision.name, vision.revision, "vision")
    family = family_of(config["model_type"], vision_families(), vision.family, vision.name, "vision")
    with _named_config(vision.name, "vision"):
        complete = family.complete(config)
        family.shape(complete, int(complete["image_size"]))
    return family, complete


def read_language(language: Language) -> tuple[LanguageFamily, dict[str, Any]]:
    """Return a language model's family and complete config. Raises UserError."""
    config = read_config(language.name, language.revision, "language")
    family = family_of(config["model_type"], language_families(), language.family, language.name, "language")
    with _named_config(language.name, "language"):
        complete = family.complete(config)
        family.shape(complete)
        family.embedding_scale(complete)
    return family, complete


@contextmanager
def _named_config(name: str, role: str, file: str = "config.json") -> Iterator[None]:
    """Raise UserError, which names the file, for a value that is missing or of a wrong type."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"model.{role}.name={name}: a value in its {file} is missing or of a wrong type ({first_line(error)})"
        ) from error


def load_tokenizer(language: Language | LanguageSpec) -> "PreTrainedTokenizerBase":
    """Load the language model's tokenizer and add `<image>` as a special token. Raises UserError when it has none."""
    from transformers import AutoTokenizer

    key = f"model.language.name={language.name}"
    if is_folder(language.name) and not has_tokenizer(language.name):
        raise UserError(f"{key}: has no tokenizer (tokenizer.json or tokenizer.model); give a folder with one")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_path(language.name), revision=language.revision, trust_remote_code=False
        )
    except Exception as error:  # the library raises plain Exception for a damaged tokenizer.json
        raise UserError(
            f"{key}: cannot load a tokenizer from there ({first_line(error)}); give a folder with one"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{key}: its tokenizer has no tokenizer.json, which preparation needs; give a folder with one")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return tokenizer


def padded_vocabulary(tokens: int, rows: int) -> int:
    """Return the embedding rows that a language model with `rows` rows needs for a tokenizer of `tokens` tokens."""
    return rows if tokens <= rows else -(-tokens // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the SHA-256 of the tokenizer's serialization. Models that share a tokenizer can share blocks."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def read_config(name: str, revision: str, role: str) -> dict[str, Any]:
    """Read a backbone's config.json; `role` (language, vision) names the key in messages. Raises UserError."""
    config = read_json(name, revision, "config.json")
    if config is None or "model_type" not in config:
        raise UserError(
            f"model.{role}.name={name}: no config.json with a model_type there; give a hub id or a Hugging Face folder"
        )
    return config


def _processor_size(processor: dict[str, Any]) -> int | None:
    """Return the output size of the stock image processor in pixels: its crop when it crops, else its size."""
    keys = ("crop_size", "size") if processor.get("do_center_crop") else ("size",)
    for key in keys:
        size = processor.get(key)
        if isinstance(size, int):
            return size
        if isinstance(size, dict):
            return size.get("height") or size.get("shortest_edge")
    return None


def family_of(model_type: str, families: Mapping[str, Family], family: str | None, name: str, role: str) -> Family:
    """Return the family that the recipe names, or else that of the model type. Raises UserError."""
    if family is not None:
        _check_family(family, families, role)
        return families[family]
    if members := find_family(families, model_type):
        return members
    raise UserError(
        f"model.{role}.name={name}: {model_type!r} is not a supported {role} family; "
        f"choose one of: {', '.join(families)}"
    )


def _validate_family(
    name: str, family: str | None, families: Mapping[str, VisionFamily] | Mapping[str, LanguageFamily], role: str
) -> None:
    if family is not None:
        _check_family(family, families, role)
    known = [hub_id for members in families.values() for hub_id in members.published]
    if name.startswith(_TOY_FOLDER) and not is_folder(name):
        raise UserError(
            f"model.{role}.name={name}: no such folder here; build it with `raylava toy {_TOY_FOLDER[:-1]}`"
        )
    if family is None and not is_folder(name) and name not in known:
        raise UserError(
            f"model.{role}.name={name!r} is neither a folder nor a known hub id; choose one of: {', '.join(known)}; "
            f"or, for another one of these families, set model.{role}.family ({', '.join(families)})"
        )
    if is_folder(name) and not storage_path(name).is_folder():
        raise UserError(f"model.{role}.name={name}: no such folder; give a Hugging Face folder or a hub id")


def _check_family(family: str, families: Mapping[str, Any], role: str) -> None:
    if family not in families:
        raise UserError(f"model.{role}.family={family!r} is not supported; choose one of: {', '.join(families)}")
