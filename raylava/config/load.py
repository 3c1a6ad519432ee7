"""A recipe's file: YAML with parents (`extends:`) and `key=value` overrides in, a Recipe or a one-line mistake out."""

import difflib
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raylava.config.recipe import ConfigModel, Recipe
from raylava.errors import UserError


def load_recipe(path: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file, its parents (`extends:`) first, `key=value` overrides last.

    Raises UserError, in one line, for a missing file, YAML that does not parse, or a key or value out of range.
    """
    data = read_recipe(path)
    for override in overrides or []:
        override_key(data, override)
    return validate(data, where=path)


def read_recipe(path: str) -> dict[str, Any]:
    """The plain mapping in a YAML file over those of its parents. Raises UserError as `load_recipe` does."""
    return _read_with_parents(Path(path), seen=())


def validate(data: dict[str, Any], where: str) -> Recipe:
    """The recipe in a plain mapping. Raises UserError that names the key, the value and the fix."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {explained(error, Recipe)}") from error


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        raise UserError(f"{path}: extends itself through {seen[-1].name}; remove one `extends:`")
    data = read_mapping(path, "recipe")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    return _merged(_read_with_parents(path.parent / str(parent), (*seen, resolved)), data)


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file that should be a `what`. Raises UserError, in one line, when it is none."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the {what} ({error.strerror}); see jobs/recipes/ for the shipped ones"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: a {what} is a mapping of keys to values, this is a {type(data).__name__}")
    return data


def _merged(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; anything else in the child replaces the parent's."""
    merged = dict(parent)
    for key, value in child.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def override_key(data: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` in place; the value is YAML. Raises UserError for what is not of that form."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not an override; write key=value, for example finetune.lr=1e-5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not valid YAML: {' '.join(str(error).split())}") from error
    put(data, key, value)


def put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set the key `a.b.c` of a plain mapping in place; a number in it is a position in a list.

    Raises UserError where the key leads through a value or past the end of a list.
    """
    *path, last = key.split(".")
    target: Any = data
    for depth, part in enumerate(path):
        target = _enter(target, part, ".".join(path[: depth + 1]))
    _put(target, last, _number_or_same(value), key)


def _number_or_same(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as a string; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _enter(target: Any, part: str, key: str) -> Any:
    if isinstance(target, list):
        return target[_position(target, part, key)]
    if target.get(part) is None:
        target[part] = {}
    inner = target[part]
    if not isinstance(inner, dict | list):
        raise UserError(f"{key} is a value ({inner!r}), it has no keys below it")
    return inner


def _put(target: Any, part: str, value: Any, key: str) -> None:
    if isinstance(target, list):
        target[_position(target, part, key)] = value
    else:
        target[part] = value


def _position(target: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise UserError(f"{key}: {part!r} is not a position in a list of {len(target)}; count from 0")
    return int(part)


def explained(error: ValidationError, section: type[ConfigModel]) -> str:
    """The first mistake in what should have been a `section`, in one line; the number of further ones, if any."""
    details = error.errors()
    problem = details[0]
    key = ".".join(str(part) for part in problem["loc"])
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_nearest(problem['loc'], section)}{more}"
    if problem["type"] == "missing":
        return f"{key} is missing; add it to the file or give {key}=…{more}"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(problem["input"], dict) else f"={problem['input']!r}"
    return f"{key}{shown}: {message}{more}" if key else f"{message}{more}"


def _nearest(location: tuple[int | str, ...], whole: type[ConfigModel]) -> str:
    known = [
        f"{'.'.join((*prefix, name))}" for prefix, section in _sections(whole, ()) for name in section.model_fields
    ]
    wanted = ".".join(str(part) for part in location if not isinstance(part, int))
    here, _, last = wanted.rpartition(".")
    siblings = [key for key in known if key.rpartition(".")[0] == here]
    by_name = {key.rpartition(".")[2]: key for key in siblings}
    close = difflib.get_close_matches(last, by_name, n=1, cutoff=0.5)
    match = by_name[close[0]] if close else next(iter(difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)), None)
    return f"; did you mean {match!r}?" if match else f"; known here: {', '.join(by_name)}"


def _sections(section: type[ConfigModel], prefix: tuple[str, ...]) -> list[tuple[tuple[str, ...], type[ConfigModel]]]:
    found = [(prefix, section)]
    for name, info in section.model_fields.items():
        for inner in _inner_sections(info.annotation):
            found += _sections(inner, (*prefix, name))
    return found


def _inner_sections(annotation: Any) -> list[type[ConfigModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, ConfigModel) else []
    return [inner for argument in typing.get_args(annotation) for inner in _inner_sections(argument)]
