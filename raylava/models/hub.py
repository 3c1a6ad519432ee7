"""Locates the files of a model, in a folder or on the Hugging Face hub at one commit, and its weights.

A hub revision such as `main` is pinned to its commit once, when a recipe is resolved, and every worker reads that
commit. Weights are read from safetensors. A model that only has PyTorch's pickle files (*.bin) is read once, without
unpickling code, and kept as safetensors in the cache folder.
"""

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylava.errors import UserError, first_line
from raylava.local_copies import HASHES_FILE, file_lock, local_copy
from raylava.storage import StoragePath, cache_folder, folder_sha256, storage_path

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_BEHAVIOR_FILES = re.compile(
    r"(config|tokenizer|special_tokens|added_tokens|vocab|merges|spiece|chat_template|processor|preprocessor|generation_config"
    r"|image_processor|video_preprocessor)[^/]*|[^/]*\.(model|jinja)|additional_chat_templates/.*"
)
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_folder(name: str) -> bool:
    """Return whether a model's name is a folder (a path or URI) rather than a hub id."""
    if "://" in name or name.startswith((".", "/", "~")):
        return True
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):  # a name that is too long, or holds a null character
        return False


def absolute_name(name: str) -> str:
    """Return a model's name that is valid on every node: folders as absolute path or URI, hub ids unchanged."""
    return storage_path(name).uri if is_folder(name) else name


def model_path(name: str) -> str:
    """Return what `from_pretrained` takes: a local folder, downloaded if it is remote, or the hub id."""
    return str(local_copy(storage_path(name))) if is_folder(name) else name


def weights_path(name: str, revision: str) -> str:
    """Return what `from_pretrained` takes to load weights from safetensors, which are converted first if need be.

    Raises UserError when the model has no weights, or only some that cannot be read safely.
    """
    folder = Path(model_path(name)) if is_folder(name) else _download_pickles(name, revision)
    if folder is None or has_safetensors([file.name for file in folder.iterdir()]):
        return name if folder is None else str(folder)
    return str(_convert_pickles(folder, name))


def read_json(name: str, revision: str, file: str) -> dict[str, Any] | None:
    """Return the content of one of the model's JSON files, or None if it has no such file.

    Raises UserError when the model does not exist, the file is damaged or the hub cannot be reached.
    """
    if is_folder(name):
        path = storage_path(name) / file
        return _parse_json(path) if path.exists() else None
    cached = _hub_file(name, file, revision)
    return _parse_json(storage_path(cached)) if cached else None


def _parse_json(file: StoragePath) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged ({first_line(error)}); copy the model's folder again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: damaged (not a mapping); copy the model's folder again")
    return content


def pin_revision(name: str, revision: str) -> str:
    """Return the commit of a hub id's revision; the revision of a folder is returned unchanged.

    Raises UserError when the hub cannot be reached and no snapshot is cached.
    """
    return revision if is_folder(name) else _hub_commit(name, revision)


def weights_identity(name: str, revision: str) -> dict[str, str]:
    """Identify a model's weights: SHA-256 by file for a folder, id and commit for a hub id.

    Raises UserError for a folder without weights, and for one with a file that is missing, cut off or damaged.
    """
    if not is_folder(name):
        return {"hub": name, "commit": pin_revision(name, revision)}
    folder = storage_path(name)
    files = {file: size for file, size in folder.walk_files() if "/" not in file}
    suffix = ".safetensors" if has_safetensors(files) else ".bin"
    _check_weight_files(folder, files, suffix)
    suffixes = (suffix, f"{suffix}.index.json", "config.json")
    return {file: _file_sha256(folder / file) for file in files if file.endswith(suffixes)}


def behavior_identity(name: str) -> dict[str, str]:
    """Return the SHA-256 of the files in a model's folder that, beside its weights, determine its answers, by path.

    These are the tokenizer, chat templates, the processor and the generation config; a hub id has none of its own, as
    its commit identifies them.
    """
    if not is_folder(name):
        return {}
    folder = storage_path(name)
    names = [file for file, _ in folder.walk_files() if is_behavior_file(file)]
    return {file: (folder / file).sha256() for file in names}


def is_behavior_file(file: str) -> bool:
    """Return whether a file of a model's folder, beside its weights, determines its answers."""
    return _BEHAVIOR_FILES.fullmatch(file) is not None


def _check_weight_files(folder: StoragePath, files: Mapping[str, int], suffix: str) -> None:
    """Raise UserError unless every file of the weights is there and, as safetensors, complete."""
    single, index = _SAFETENSORS if suffix == ".safetensors" else _PICKLES
    if single in files:
        shards = {single}
    elif index in files:
        shards = _shards(folder / index)
    else:
        raise UserError(f"{folder}: has neither {_SAFETENSORS[0]} nor {_PICKLES[0]}; give a folder with weights")
    for shard in sorted(shards):
        if shard not in files:
            raise UserError(f"{folder}: {shard} is missing, which {index} names; give a complete folder")
        if suffix == ".safetensors" and files[shard] != _safetensors_size(folder / shard):
            raise UserError(f"{folder / shard}: damaged or cut off; copy the folder again")


def _shards(index: StoragePath) -> set[str]:
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: damaged ({first_line(error)}); copy the folder again") from error
    if any(not isinstance(shard, str) or Path(shard).name != shard for shard in shards):
        raise UserError(f"{index}: names files outside of its folder; give a complete folder")
    return shards


def _safetensors_size(file: StoragePath) -> int | None:
    """Return the size in bytes that a safetensors file states in its header, None without a valid header."""
    with file.open_random() as stream:
        size = int.from_bytes(stream.read(8) or b"", "little")
        if not 2 <= size <= _MAX_HEADER:
            return None
        try:
            header = json.loads(stream.read(size) or b"")
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            return 8 + size + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None


def has_tokenizer(name: str) -> bool:
    """Return whether a folder has a tokenizer's vocabulary: without one, transformers makes an empty tokenizer."""
    return any((storage_path(name) / file).exists() for file in _VOCABULARIES)


def has_safetensors(files: Collection[str]) -> bool:
    """Return whether a model with these files is loaded from safetensors rather than from pickle files."""
    return any(file in files for file in _SAFETENSORS)


def _file_sha256(file: StoragePath) -> str:
    """Return the SHA-256 of a file, computed once per process for each version of it."""
    return _version_sha256(file.uri, tuple(file.file_versions()))


@cache
def _version_sha256(uri: str, version: tuple[tuple[str, int, str], ...]) -> str:
    return storage_path(uri).sha256()


@cache
def _hub_commit(name: str, revision: str) -> str:
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import model_info

    try:
        return str(model_info(name, revision=revision).sha)
    except Exception:  # offline or gated: the folder name of the cached snapshot is its commit
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True)).name
        except (OSError, ValueError) as error:  # ValueError: a name that no hub id has
            raise UserError(
                f"{name}@{revision}: the hub cannot be reached and no copy is cached; use a folder"
            ) from error


def _hub_file(name: str, file: str, revision: str) -> str | None:
    """Return the local path of one file of a hub id, or None if there is no such file."""
    from transformers.utils import cached_file

    try:
        return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise UserError(f"{name}: not a local folder, and the hub has no such model or cannot be reached") from error


def _download_pickles(name: str, revision: str) -> Path | None:
    """Return a local copy of a hub id that has only pickle files, None if it has safetensors at this commit."""
    if any(_hub_file(name, file, revision) for file in _SAFETENSORS):
        return None
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.txt", "pytorch_model*.bin"]))


def _convert_pickles(folder: Path, name: str) -> Path:
    """Return a folder of the cache with the model's JSON files and its weights as safetensors. Raises UserError."""
    files = _pickle_files(folder, name)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {_file_sha256(storage_path(file))}\n".encode())
    target = cache_folder() / "safetensors" / digest.hexdigest()[:32]
    target.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(target.with_suffix(".lock")):  # one process of a node converts, the others wait
        if not target.exists():
            _write_safetensors(folder, files, target, name)
            logger.info("%s: converted %s to safetensors in %s", name, ", ".join(file.name for file in files), target)
    for file, expected in json.loads((target / HASHES_FILE).read_text()).items():
        if storage_path(target / file).sha256() != expected:
            raise UserError(f"{target / file}: changed since it was converted from {name}; delete {target}")
    return target


def _pickle_files(folder: Path, name: str) -> list[Path]:
    single, index = (folder / file for file in _PICKLES)
    if single.exists():
        return [single]
    if index.exists():
        return [folder / shard for shard in sorted(_shards(storage_path(index)))]
    raise UserError(f"{name}: has neither {_SAFETENSORS[0]} nor {_PICKLES[0]}; give a folder with weights")


def _write_safetensors(folder: Path, files: list[Path], target: Path, name: str) -> None:
    """Write the converted model to a temporary folder, and rename it: a reader sees a complete folder or none."""
    from huggingface_hub import save_torch_state_dict

    weights = {key: value for file in files for key, value in _read_pickle(file, name).items()}
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix="partial-"))
    try:
        save_torch_state_dict({key: value.contiguous() for key, value in weights.items()}, partial)
        for file in folder.glob("*.json"):
            if file.name not in (*_PICKLES, HASHES_FILE):
                shutil.copy(file, partial)
        (partial / HASHES_FILE).write_text(json.dumps(folder_sha256(partial)))
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_pickle(file: Path, name: str) -> "dict[str, Tensor]":
    """Return the tensors of a pickle file by name. Raises UserError when it holds anything else."""
    import torch

    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the pickle module raises exceptions of any kind for foreign bytes
        raise UserError(
            f"{name}: {file.name} holds more than tensors or is damaged, and is not unpickled "
            f"({first_line(error)[:120]}); give a folder with safetensors"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{name}: {file.name} is not a mapping of names to tensors; give a folder with safetensors")
    return weights
