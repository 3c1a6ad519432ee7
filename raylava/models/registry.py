"""The registry of vision and language families, and the resolution of a recipe's backbones.

A recipe names a backbone by hub id or folder; `resolve_model` turns these names into a ResolvedModel, which is
serializable and passed to every stage. Only configuration files are read here; llava.py loads weights.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylava.config.recipe import Language, Model, Vision
from raylava.errors import UserError
from raylava.models.templates import GEMMA, IMAGE_TOKEN, Template
from raylava.storage import storage_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARY_MULTIPLE = 64  # added embedding rows are padded to a multiple of this, for efficient matrix products
FEATURE_LAYER = -2  # hidden_states[-2] of the tower, for every family (LLaVA; LLaVA-Gemma for CLIP and DINOv2)


@dataclass(frozen=True)
class VisionFamily:
    """What the members of a vision family share. `model_class` is the name of a class in transformers."""

    model_types: tuple[str, ...]
    model_class: str
    has_cls: bool


@dataclass(frozen=True)
class LanguageFamily:
    """What the members of a language family share."""

    model_types: tuple[str, ...]
    template: Template


VISION_FAMILIES = {
    "clip": VisionFamily(("clip", "clip_vision_model"), "CLIPVisionModel", has_cls=True),
    "dinov2": VisionFamily(("dinov2",), "Dinov2Model", has_cls=True),
    "siglip": VisionFamily(("siglip", "siglip_vision_model"), "SiglipVisionModel", has_cls=False),
}
LANGUAGE_FAMILIES = {
    "gemma": LanguageFamily(("gemma",), GEMMA),
}


@dataclass(frozen=True)
class KnownVision:
    """What is known of a published backbone without network access. Sizes in pixels."""

    family: str
    image_size: int
    patch_size: int


KNOWN_VISION = {
    "openai/clip-vit-large-patch14-336": KnownVision("clip", 336, 14),
    "openai/clip-vit-large-patch14": KnownVision("clip", 224, 14),
    "facebook/dinov2-large": KnownVision("dinov2", 224, 14),
    "facebook/dinov2-base": KnownVision("dinov2", 224, 14),
    "google/siglip-so400m-patch14-384": KnownVision("siglip", 384, 14),
}
KNOWN_LANGUAGE = {
    "google/gemma-2b-it": "gemma",
    "google/gemma-7b-it": "gemma",
    "google/gemma-1.1-2b-it": "gemma",
    "google/gemma-1.1-7b-it": "gemma",
}


@dataclass(frozen=True)
class PixelRule:
    """How an image becomes the backbone's input: `size` in pixels per side; mean and std per RGB channel, in [0, 1]."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class VisionSpec:
    """A resolved vision backbone. `width` is its hidden size."""

    name: str
    revision: str
    family: str
    pixels: PixelRule
    patch_size: int
    width: int

    @property
    def has_cls(self) -> bool:
        return VISION_FAMILIES[self.family].has_cls

    @property
    def image_tokens(self) -> int:
        """Tokens that one image occupies in the language model's sequence."""
        return (self.pixels.size // self.patch_size) ** 2

    @property
    def select_strategy(self) -> str:
        """transformers' name of the CLS rule: `default` drops the first token, `full` keeps all."""
        return "default" if self.has_cls else "full"

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return what determines prepared blocks: pixels and token count, not weights."""
        return {"pixels": asdict(self.pixels), "image_tokens": self.image_tokens}


@dataclass(frozen=True)
class LanguageSpec:
    """A resolved language model. `width` is its hidden size, `vocabulary` its number of embedding rows."""

    name: str
    revision: str
    family: str
    width: int
    vocabulary: int

    @property
    def template(self) -> Template:
        return LANGUAGE_FAMILIES[self.family].template


@dataclass(frozen=True)
class ResolvedModel:
    """The model of a recipe with its backbones resolved: all that stages need to know about it, serializable.

    `connector_weights` is the location of a connector artifact that replaces random initialization.
    """

    language: LanguageSpec
    vision: VisionSpec
    connector_weights: str | None = None


def validate_backbones(language: Language, vision: Vision) -> None:
    """Refuse an unknown backbone without network access or weights. Raises UserError."""
    known_vision = {name: known.family for name, known in KNOWN_VISION.items()}
    _validate_family(vision.name, vision.family, VISION_FAMILIES, known_vision, "vision")
    _validate_family(language.name, language.family, LANGUAGE_FAMILIES, KNOWN_LANGUAGE, "language")


def resolve_model(model: Model) -> ResolvedModel:
    """Resolve both backbones from their configuration files. Raises UserError when one is missing or unsupported."""
    return ResolvedModel(resolve_language(model.language), resolve_vision(model.vision), model.connector.weights)


def resolve_vision(vision: Vision) -> VisionSpec:
    """Resolve a vision backbone from its config and preprocessor files. Raises UserError when it is unsupported."""
    config = read_config(vision.name, vision.revision, "vision")
    family = vision.family or _family_of(config["model_type"], VISION_FAMILIES, vision.name, "vision")
    tower = config.get("vision_config", config)
    processor = _read_json(vision.name, vision.revision, "preprocessor_config.json")
    if processor is None:
        raise UserError(f"model.vision.name={vision.name}: has no preprocessor_config.json; give a folder that has one")
    size = vision.image_size or _processor_size(processor) or tower["image_size"]
    _validate_image_size(vision, family, size, tower)
    pixels = PixelRule(size, tuple(processor["image_mean"]), tuple(processor["image_std"]))
    return VisionSpec(vision.name, vision.revision, family, pixels, tower["patch_size"], tower["hidden_size"])


def _validate_image_size(vision: Vision, family: str, size: int, tower: dict[str, Any]) -> None:
    patch = tower["patch_size"]
    if size % patch:
        raise UserError(
            f"model.vision.image_size={size} is not a multiple of {vision.name}'s patch size {patch}; "
            f"try {size // patch * patch}"
        )
    if family == "clip" and size != tower["image_size"]:
        raise UserError(f"model.vision.image_size={size}: {vision.name} takes {tower['image_size']} only; leave it out")


def resolve_language(language: Language) -> LanguageSpec:
    """Resolve a language model from its config.json. Raises UserError when it is missing or of an unknown family."""
    config = read_config(language.name, language.revision, "language")
    family = language.family or _family_of(config["model_type"], LANGUAGE_FAMILIES, language.name, "language")
    return LanguageSpec(language.name, language.revision, family, config["hidden_size"], config["vocab_size"])


def load_tokenizer(language: Language | LanguageSpec) -> "PreTrainedTokenizerBase":
    """Load the language model's tokenizer and add `<image>` as a special token. Raises UserError when it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone_path(language.name), revision=language.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"model.language.name={language.name}: cannot load a tokenizer from there ({error})") from error
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return tokenizer


def padded_vocabulary(tokens: int, rows: int) -> int:
    """Return the embedding rows that a language model with `rows` rows needs for a tokenizer of `tokens` tokens."""
    return rows if tokens <= rows else -(-tokens // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the SHA-256 of the tokenizer's serialization. Models that share a tokenizer can share blocks."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def weights_identity(name: str, revision: str) -> dict[str, str]:
    """Identify a backbone's weights: SHA-256 by file for a folder, id and commit for a hub id."""
    folder = storage_path(backbone_path(name))
    if not is_folder(name):
        return {"hub": name, "commit": _hub_commit(name, revision)}
    return {file: _file_sha256(str(folder / file)) for file, _ in folder.walk_files() if _is_weights_file(file)}


def is_folder(name: str) -> bool:
    """Return whether a backbone's name is a folder (a path or URI) rather than a hub id."""
    return "://" in name or name.startswith((".", "/", "~")) or Path(name).is_dir()


def absolute_name(name: str) -> str:
    """Return a backbone's name that is valid on every node: folders as absolute path or URI, hub ids unchanged."""
    return storage_path(name).uri if is_folder(name) else name


def backbone_path(name: str) -> str:
    """Return what `from_pretrained` takes: a local folder, downloaded if it is remote, or the hub id."""
    return str(storage_path(name).local_copy()) if is_folder(name) else name


def _is_weights_file(file: str) -> bool:
    return "/" not in file and file.endswith((".safetensors", ".safetensors.index.json", "config.json"))


@cache
def _file_sha256(uri: str) -> str:
    return storage_path(uri).sha256()


@cache
def _hub_commit(name: str, revision: str) -> str:
    from huggingface_hub import model_info

    try:
        return str(model_info(name, revision=revision).sha)
    except Exception:  # offline or gated: the folder name of the cached snapshot is its commit
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True)).name
        except OSError as error:
            raise UserError(
                f"{name}@{revision}: the hub cannot be reached and no copy is cached; use a folder"
            ) from error


def read_config(name: str, revision: str, role: str) -> dict[str, Any]:
    """Read a backbone's config.json; `role` (language, vision) names the key in messages. Raises UserError."""
    config = _read_json(name, revision, "config.json")
    if config is None or "model_type" not in config:
        raise UserError(
            f"model.{role}.name={name}: no config.json with a model_type there; give a hub id or a Hugging Face folder"
        )
    return config


def _read_json(name: str, revision: str, file: str) -> dict[str, Any] | None:
    if is_folder(name):
        path = storage_path(name) / file
        return json.loads(path.read_bytes()) if path.exists() else None

    from transformers.utils import cached_file

    try:
        cached = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise UserError(f"{name}: not a local folder, and the hub has no such model or cannot be reached") from error
    return json.loads(Path(cached).read_text()) if cached else None


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


def _family_of(model_type: str, families: dict[str, Any], name: str, role: str) -> str:
    for family, members in families.items():
        if model_type in members.model_types:
            return family
    raise UserError(
        f"model.{role}.name={name}: {model_type!r} is not a supported {role} family; "
        f"choose one of: {', '.join(families)}"
    )


def _validate_family(name: str, family: str | None, families: dict[str, Any], known: dict[str, str], role: str) -> None:
    if family is not None and family not in families:
        raise UserError(f"model.{role}.family={family!r} is not supported; choose one of: {', '.join(families)}")
    if family is None and not is_folder(name) and name not in known:
        raise UserError(
            f"model.{role}.name={name!r} is neither a folder nor a known hub id; choose one of: {', '.join(known)}; "
            f"or, for another one of these families, set model.{role}.family ({', '.join(families)})"
        )
    if is_folder(name) and not storage_path(name).is_folder():
        raise UserError(f"model.{role}.name={name}: no such folder; give a Hugging Face folder or a hub id")
