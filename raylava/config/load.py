"""Read a recipe from YAML: parents (`extends:`) first, `key=value` overrides last, then validate.

Every mistake is reported as a UserError of one line that names the key, the value and the fix.
"""

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raylava.config.recipe import ConfigModel, Recipe
from raylava.config.shipped import locate
from raylava.errors import UserError

_EXPONENT_WITHOUT_POINT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # a number in YAML 1.2, a string in YAML 1.1
# Keys of recipes written before the keys were standardized (old → new), by their last part.
RENAMED_KEYS = {
    "global_batch": "global_batch_size",
    "warmup": "warmup_ratio",
    "clip_norm": "max_grad_norm",
    "schedule": "lr_schedule",
    "epsilon": "eps",
    "attention": "attn_implementation",
    "pack_tokens": "max_tokens_per_pack",
    "shuffle_gb": "shuffle_window_gb",
    "stop_after_skipped": "max_consecutive_skips",
    "checkpoints": "checkpoint",
    "every_steps": "interval_steps",
    "every_minutes": "interval_minutes",
    "keep": "keep_latest",
    "retry_minutes": "upload_timeout_minutes",
    "fit": "image_aspect",
    "too_long": "on_overlong",
    "limit": "max_rows",
    "weight": "sampling_weight",
    "rows_per_block": "samples_per_block",
    "store": "image_encoding",
    "kind": "benchmark",
    "score": "metric",
    "suffix": "prompt_suffix",
    "train_on": "train_node_labels",
    "prepare_on": "prepare_node_labels",
}
RENAMED_VALUES = {"blank_pictures": "blank_images", "trim": "truncate_exchanges", "own": "custom"}


def load_recipe(path: str, overrides: list[str] | None = None) -> Recipe:
    """Load the recipe in a YAML file, or the shipped one of that name, with parents and `key=value` overrides applied.

    Raises UserError, in one line, for a missing file, YAML that does not parse, or a key or value out of range.
    """
    data = read_recipe(path)
    for override in overrides or []:
        apply_override(data, override)
    return validate(data, source=path)


def read_recipe(path: str) -> dict[str, Any]:
    """Read a recipe, a file or a shipped one, merged over its parents, without validation.

    Raises UserError like `load_recipe`.
    """
    return _read_with_parents(locate(path), visited=())


def validate(data: dict[str, Any], source: str) -> Recipe:
    """Validate a plain mapping as a recipe. Raises UserError that names the source, the key, the value and the fix."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{source}: {describe_error(error, Recipe)}") from error


def _read_with_parents(path: Path, visited: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in visited:
        raise UserError(f"{path}: extends itself through {visited[-1].name}; remove one `extends:`")
    data = read_mapping(path, "recipe")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends={parent!r} is not the path of a recipe; name one, or remove it")
    return _merge(_read_with_parents(locate(parent, path.parent), (*visited, resolved)), data)


def read_mapping(path: Path, expected: str) -> dict[str, Any]:
    """Read the mapping in a YAML file; `expected` (recipe, sweep) names it in messages. Raises UserError."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the {expected} ({error.strerror}); `raylava recipes` lists the shipped ones"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also of numbers and nesting that are too long
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: a {expected} is a mapping of keys to values, this is a {type(data).__name__}")
    return data


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain values. Raises yaml.YAMLError, also for a key that a mapping has twice."""
    return yaml.load(text, _UniqueKeyLoader)  # noqa: S506 (a SafeLoader)


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, which takes the last of two equal keys in silence, made to refuse them."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key_node, _ in node.value:
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if name in seen and name is not None:
                raise yaml.composer.ComposerError(
                    None, None, f"the key {name!r} occurs twice; remove one", key_node.start_mark
                )
            seen.add(name)
        return node


def _merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key; any other value of the child replaces the parent's."""
    merged = dict(parent)
    for key, value in child.items():
        both_mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_mappings else value
    return merged


def apply_override(data: dict[str, Any], override: str) -> None:
    """Apply `a.b.c=value` in place; the value is YAML. Raises UserError for an override of another form."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not an override; write key=value, for example finetune.lr=1e-5")
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{override[:200]!r}: the value is not valid YAML: {' '.join(str(error).split())}") from error
    set_key(data, key, value)


def set_key(data: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted key `a.b.c` of nested mappings in place; a number in it is a list index.

    Raises UserError where the key leads through a value or past the end of a list.
    """
    *parents, last = key.split(".")
    target: Any = data
    for depth, part in enumerate(parents):
        target = _descend(target, part, ".".join(parents[: depth + 1]))
    if isinstance(target, list):
        target[_list_index(target, last, key)] = _parse_number(value)
    else:
        target[last] = _parse_number(value)


def _parse_number(value: Any) -> Any:
    """Convert numbers such as 1e-5, which YAML 1.1 reads as strings."""
    return float(value) if isinstance(value, str) and _EXPONENT_WITHOUT_POINT.fullmatch(value) else value


def _descend(target: Any, part: str, key: str) -> Any:
    if isinstance(target, list):
        return target[_list_index(target, part, key)]
    if target.get(part) is None:
        target[part] = {}
    child = target[part]
    if not isinstance(child, dict | list):
        raise UserError(f"{key} is a value ({child!r}), it has no keys below it")
    return child


def _list_index(target: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise UserError(f"{key}: {part!r} is not an index into a list of {len(target)}; indices start at 0")
    return int(part)


def describe_error(error: ValidationError, config: type[ConfigModel]) -> str:
    """Describe the first validation error of a `config` in one line, and count the others."""
    details = error.errors()
    problem = details[0]
    key = ".".join(str(part) for part in problem["loc"])
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_suggest_key(problem['loc'], config)}{more}"
    if problem["type"] == "missing":
        return f"{key} is missing; add it to the file or give {key}=…{more}"
    message = problem["msg"].removeprefix("Value error, ")
    replacement = RENAMED_VALUES.get(problem["input"]) if isinstance(problem["input"], str) else None
    if replacement and problem["type"] == "literal_error":
        message = f"was renamed to {replacement!r}"
    value = "" if isinstance(problem["input"], dict) else f"={problem['input']!r}"
    return f"{key}{value}: {message}{more}" if key else f"{message}{more}"


def _suggest_key(location: tuple[int | str, ...], config: type[ConfigModel]) -> str:
    """Suggest the new name of a renamed key, else the most similar key, else list the keys of the section."""
    known = [
        f"{'.'.join((*prefix, name))}" for prefix, section in _sections(config, ()) for name in section.model_fields
    ]
    unknown = ".".join(str(part) for part in location if not isinstance(part, int))
    parent, _, last = unknown.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent}
    if RENAMED_KEYS.get(last) in siblings:
        return f"; it was renamed to {siblings[RENAMED_KEYS[last]]!r}"
    similar = difflib.get_close_matches(last, siblings, n=1, cutoff=0.5)
    match = (
        siblings[similar[0]]
        if similar
        else next(iter(difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)), None)
    )
    return f"; did you mean {match!r}?" if match else f"; choose one of: {', '.join(siblings)}"


def _sections(config: type[ConfigModel], prefix: tuple[str, ...]) -> list[tuple[tuple[str, ...], type[ConfigModel]]]:
    """List a config class and all sections below it with their key prefixes."""
    sections = [(prefix, config)]
    for name, info in config.model_fields.items():
        for section in nested_sections(info.annotation):
            sections += _sections(section, (*prefix, name))
    return sections


def nested_sections(annotation: Any) -> list[type[ConfigModel]]:
    """List the config classes in a field's type annotation."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, ConfigModel) else []
    return [section for argument in typing.get_args(annotation) for section in nested_sections(argument)]
