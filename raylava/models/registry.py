"""The registry: which vision and language families there are, and what raylava must know of each.

A recipe names a backbone by hub id or folder; here it becomes a VisionSpec or LanguageSpec. Reads configuration files
only: weights are llava.py's business.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylava.config.recipe import Language, Vision
from raylava.errors import UserError
from raylava.models.templates import GEMMA, Template
from raylava.storage import storage_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARY_MULTIPLE = 64  # embedding rows are padded to this, which matrix units like
FEATURE_LAYER = -2  # hidden_states[-2], for every family (LLaVA; kept by LLaVA-Gemma for CLIP and DINOv2)


@dataclass(frozen=True)
class VisionFamily:
    """What the members of one vision family share. `model_class` is a name in transformers."""

    model_types: tuple[str, ...]
    model_class: str
    has_cls: bool


@dataclass(frozen=True)
class LanguageFamily:
    """What the members of one language family share."""

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
    """What can be said of a published backbone without the network. `image_size` in pixels a side."""

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
    """How a image becomes the backbone's input: `size` pixels a side; mean and std per RGB channel, in [0, 1]."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class VisionSpec:
    """A vision backbone, resolved. `image_tokens` is what one image costs in the language model's sequence."""

    name: str
    family: str
    pixels: PixelRule
    patch_size: int
    width: int

    @property
    def has_cls(self) -> bool:
        return VISION_FAMILIES[self.family].has_cls

    @property
    def image_tokens(self) -> int:
        return (self.pixels.size // self.patch_size) ** 2

    @property
    def select_strategy(self) -> str:
        """transformers' name for the CLS rule: `default` drops the first token, `full` keeps all."""
        return "default" if self.has_cls else "full"

    def identity(self) -> dict[str, Any]:
        """What of the backbone decides prepared blocks: pixels and token count, not its weights."""
        return {"pixels": asdict(self.pixels), "image_tokens": self.image_tokens}


@dataclass(frozen=True)
class LanguageSpec:
    """A language model, resolved. `width` is its hidden size."""

    name: str
    family: str
    width: int
    vocabulary: int

    @property
    def template(self) -> Template:
        return LANGUAGE_FAMILIES[self.family].template


def check_known(language: Language, vision: Vision) -> None:
    """Refuse, without network or weights, a backbone that raylava cannot know what to do with. Raises UserError."""
    _known_family(vision.name, vision.family, VISION_FAMILIES, {k: v.family for k, v in KNOWN_VISION.items()}, "vision")
    _known_family(language.name, language.family, LANGUAGE_FAMILIES, KNOWN_LANGUAGE, "language")


def resolve_vision(vision: Vision) -> VisionSpec:
    """The backbone's facts from its configuration files. Raises UserError when it is missing, unknown or unfit."""
    config = read_config(vision.name, vision.revision, "vision")
    family = vision.family or _family_of(config["model_type"], VISION_FAMILIES, vision.name, "vision")
    tower = config.get("vision_config", config)
    processor = _read_json(vision.name, vision.revision, "preprocessor_config.json")
    if processor is None:
        raise UserError(f"model.vision.name={vision.name}: has no preprocessor_config.json; give a folder that has one")
    size = vision.image_size or _input_size(processor) or tower["image_size"]
    patch = tower["patch_size"]
    if size % patch:
        raise UserError(
            f"model.vision.image_size={size} is not a multiple of {vision.name}'s patch size {patch}; "
            f"try {size // patch * patch}"
        )
    if family == "clip" and size != tower["image_size"]:
        raise UserError(f"model.vision.image_size={size}: {vision.name} takes {tower['image_size']} only; leave it out")
    rule = PixelRule(size, tuple(processor["image_mean"]), tuple(processor["image_std"]))
    return VisionSpec(vision.name, family, rule, patch, tower["hidden_size"])


def resolve_language(language: Language) -> LanguageSpec:
    """The language model's facts from its config.json. Raises UserError when it is missing or of an unknown family."""
    config = read_config(language.name, language.revision, "language")
    family = language.family or _family_of(config["model_type"], LANGUAGE_FAMILIES, language.name, "language")
    return LanguageSpec(language.name, family, config["hidden_size"], config["vocab_size"])


def load_tokenizer(language: Language) -> "PreTrainedTokenizerBase":
    """The language model's tokenizer, with `<image>` as a special token. Raises UserError when it has none."""
    from transformers import AutoTokenizer

    from raylava.models.templates import IMAGE_TOKEN

    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone_path(language.name), revision=language.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"model.language.name={language.name}: no tokenizer could be loaded there ({error})") from error
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return tokenizer


def vocabulary_for(tokens: int, rows: int) -> int:
    """Embedding rows of a language model that has `rows` of them, once it knows so many `tokens`."""
    return rows if tokens <= rows else -(-tokens // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 over the tokenizer's whole serialisation: models that share a tokenizer share blocks."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def weights_identity(name: str, revision: str) -> dict[str, str]:
    """What names a backbone's weights: the content of a folder's files, or a hub id and the commit it stands at."""
    folder = storage_path(backbone_path(name))
    if not is_folder(name):
        return {"hub": name, "commit": _hub_commit(name, revision)}
    return {file: _file_hash(str(folder / file)) for file, _ in folder.walk_files() if _decides_weights(file)}


def is_folder(name: str) -> bool:
    """Whether a backbone's name means a folder (a path or URI) rather than a hub id."""
    return "://" in name or name.startswith((".", "/", "~")) or Path(name).is_dir()


def located(name: str) -> str:
    """A backbone's name that means the same on every node: folders by absolute path or URI, hub ids as they are."""
    return storage_path(name).uri if is_folder(name) else name


def backbone_path(name: str) -> str:
    """What transformers' `from_pretrained` takes for a backbone: a local folder, fetched if need be, or the hub id."""
    return str(storage_path(name).local_copy()) if is_folder(name) else name


def _decides_weights(file: str) -> bool:
    return "/" not in file and file.endswith((".safetensors", ".safetensors.index.json", "config.json"))


@cache
def _file_hash(uri: str) -> str:
    return storage_path(uri).sha256()


@cache
def _hub_commit(name: str, revision: str) -> str:
    from huggingface_hub import model_info

    try:
        return str(model_info(name, revision=revision).sha)
    except Exception:  # offline or gated: the cached snapshot's folder name is the commit it was fetched at
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True)).name
        except OSError as error:
            raise UserError(
                f"{name}@{revision}: the hub cannot be reached and no copy is cached; use a folder"
            ) from error


def read_config(name: str, revision: str, role: str) -> dict[str, Any]:
    """A backbone's config.json; `role` (language, vision) is for the message. Raises UserError when there is none."""
    config = _read_json(name, revision, "config.json")
    if config is None or "model_type" not in config:
        raise UserError(
            f"model.{role}.name={name}: no config.json with a model_type there; give a hub id or a Hugging Face folder"
        )
    return config


def _read_json(name: str, revision: str, file: str) -> dict[str, Any] | None:
    from transformers.utils import cached_file

    if is_folder(name):
        path = storage_path(name) / file
        return json.loads(path.read_bytes()) if path.exists() else None
    try:
        found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise UserError(f"{name}: not a folder here, and the hub has no such model or cannot be reached") from error
    return json.loads(Path(found).read_text()) if found else None


def _input_size(processor: dict[str, Any]) -> int | None:
    """Pixels a side that the stock processor hands on: its crop when it crops, else its size."""
    keys = ("crop_size", "size") if processor.get("do_center_crop") else ("size",)
    for key in keys:
        size = processor.get(key)
        if isinstance(size, int):
            return size
        if isinstance(size, dict):
            return size.get("height") or size.get("shortest_edge")
    return None


def _family_of(model_type: str, families: dict[str, Any], name: str, role: str) -> str:
    for family, facts in families.items():
        if model_type in facts.model_types:
            return family
    raise UserError(
        f"model.{role}.name={name}: {model_type!r} is not a {role} family raylava knows; known: {', '.join(families)}"
    )


def _known_family(name: str, given: str | None, families: dict[str, Any], known: dict[str, str], role: str) -> None:
    if given is not None and given not in families:
        raise UserError(f"model.{role}.family={given!r} is not known; known: {', '.join(families)}")
    if given is None and not is_folder(name) and name not in known:
        raise UserError(
            f"model.{role}.name={name!r} is neither a folder nor a known hub id; known: {', '.join(known)}; "
            f"for another one of these families set model.{role}.family ({', '.join(families)})"
        )
    if is_folder(name) and not storage_path(name).is_folder():
        raise UserError(f"model.{role}.name={name}: no such folder; give a Hugging Face folder or a hub id")
