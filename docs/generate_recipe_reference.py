"""Generate docs/recipe.md from the config models in raylava/config/recipe.py.

Run it as `.venv/bin/python docs/generate_recipe_reference.py`. Keys, types, defaults and fingerprint membership come
from the fields, descriptions from the docstrings of the models. A test fails while docs/recipe.md differs from what
this script generates.
"""

import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raylava.config.load import nested_sections
from raylava.config.recipe import ConfigModel, Recipe, is_fingerprinted

OUTPUT = Path(__file__).parent / "recipe.md"
COMMAND = ".venv/bin/python docs/generate_recipe_reference.py"

_INTRODUCTION = f"""\
# Recipe reference

<!-- Generated from raylava/config/recipe.py; edit the docstrings there, then run
     `{COMMAND}`. -->

A recipe is a YAML file that holds every setting of an experiment. `extends: PARENT.yaml` merges it over another recipe;
only what differs is written. On the command line, `key=value` changes any setting, for example `finetune.lr=1e-5` or
`evaluate.0.max_new_tokens=16` (list items are numbered from 0). `raylava check RECIPE` reports unknown keys and values
out of range without network, weights or cluster.

`raylava recipes` lists the shipped recipes and sweeps ([jobs/recipes/](../jobs/recipes)). Their names work wherever a
file does: `raylava run toy`, `extends: llava-gemma-2b`, `recipe: toy` of a sweep. A name has no `/` and no suffix
`.yaml` or `.yml`; a file of that name takes precedence. Relative paths in a named recipe start at the current folder,
as those in a file do. `raylava recipes copy toy mine.yaml` writes a copy to edit.

The column *fingerprint* says whether a key takes part in the fingerprints of artifacts (see
[architecture](architecture.md#fingerprints)): **yes** for a setting that determines the result, so that changing it
builds new artifacts; **no** for one that only affects how the result is computed. Files and models are identified by
their content: the location of a corpus is not part of a fingerprint, the content of its files is, and a backbone or
connector in a folder is identified by its files. A dash in the column *default* marks a required key.
"""


def generate() -> str:
    """Return the content of docs/recipe.md."""
    sections = list(_sections())
    anchors = {section.config: _anchor(section.title) for section in sections}
    return "\n".join([_INTRODUCTION, *(_render(section, anchors) for section in sections)])


@dataclass(frozen=True)
class _Section:
    """A config class with its keys in a recipe, whether it is fingerprinted, and its own default at some keys."""

    keys: list[str]
    config: type[ConfigModel]
    fingerprinted: bool
    defaults: dict[str, Any]

    @property
    def title(self) -> str:
        return "Top level" if self.config is Recipe else ", ".join(f"`{key}`" for key in self.keys)


def _sections() -> Iterator[_Section]:
    """Yield each config class once, in the order of the recipe."""
    keys: dict[type[ConfigModel], list[str]] = {Recipe: [""]}
    fingerprinted: dict[type[ConfigModel], bool] = {Recipe: True}
    defaults: dict[type[ConfigModel], dict[str, Any]] = {}
    pending: list[type[ConfigModel]] = [Recipe]
    while pending:
        config = pending.pop(0)
        children = []
        for name, info in config.model_fields.items():
            for child in nested_sections(info.annotation):
                suffix = "[]" if _is_list(info.annotation) else ""
                paths = [f"{prefix}.{name}{suffix}".lstrip(".") for prefix in keys[config]]
                if child not in keys:
                    children.append(child)
                    fingerprinted[child] = fingerprinted[config] and is_fingerprinted(info)
                keys.setdefault(child, []).extend(paths)
                if isinstance(info.default, BaseModel):
                    defaults.setdefault(child, {}).update(dict.fromkeys(paths, info.default))
        pending = children + pending
        yield _Section(keys[config], config, fingerprinted[config], defaults.get(config, {}))


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (tuple, list)


def _anchor(title: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _render(section: _Section, anchors: dict[type[ConfigModel], str]) -> str:
    """Return the Markdown of one section: heading, description, table of keys."""
    lines = [f"## {section.title}", "", inspect.cleandoc(section.config.__doc__ or ""), ""]
    lines += ["| key | type | default | fingerprint |", "| --- | --- | --- | --- |"]
    for name, info in section.config.model_fields.items():
        default = _format_defaults(name, info, section)
        in_fingerprint = "yes" if section.fingerprinted and is_fingerprinted(info) else "no"
        lines.append(f"| `{name}` | {_format_type(info, anchors)} | {default} | {in_fingerprint} |")
    return "\n".join([*lines, ""])


def _format_defaults(name: str, info: FieldInfo, section: _Section) -> str:
    """Return the default, and those of sections (pretrain, finetune) whose own default differs from it."""
    if info.is_required():
        return "—"
    text = _format_value(info.default)
    changed = {key: getattr(config, name) for key, config in section.defaults.items()}
    changed = {key: value for key, value in changed.items() if value != info.default}
    return ", ".join([text, *(f"{_format_value(value)} in `{key}`" for key, value in changed.items())])


def _format_value(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "see below"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(str(item) for item in value)}]`"
    if isinstance(value, float):
        return f"`{_format_number(value)}`"
    return f'`"{value}"`' if value == "" else f"`{value}`"


def _format_number(value: Any) -> str:
    """Write 1e-05 as 1.0e-5, which YAML 1.1 reads as a number, so that defaults can be copied."""
    return re.sub(r"^(\d+)(\.\d+)?e-0*(\d+)$", lambda match: f"{match[1]}{match[2] or '.0'}e-{match[3]}", repr(value))


def _format_type(info: FieldInfo, anchors: dict[type[ConfigModel], str]) -> str:
    """Return a field's type in YAML's terms, with its bounds; a section links to its table."""
    base = _format_annotation(info.annotation)
    for config in nested_sections(info.annotation):
        base = base.replace("section", f"[section](#{anchors[config]})")
    bounds = _bounds(info.metadata)
    return f"{base}, {bounds}" if bounds else base


def _format_annotation(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " / ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        bounds = _bounds(list(arguments[1:]))
        return _format_annotation(arguments[0]) + (f", {bounds}" if bounds else "")
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_format_annotation(option) for option in arguments if option is not type(None))
    if origin in (tuple, list):
        if len(arguments) > 1 and arguments[1] is not Ellipsis:
            return f"list of {len(arguments)} of: {_format_annotation(arguments[0])}"
        return f"list of: {_format_annotation(arguments[0])}"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping of strings to {_format_annotation(arguments[1])}s"
    if isinstance(annotation, type) and issubclass(annotation, ConfigModel):
        return "section"
    return {str: "string", int: "integer", float: "number", bool: "boolean"}[annotation]


def _bounds(metadata: list[Any]) -> str:
    """Return the constraints of a field in words and symbols; validators have none."""
    flat = [item for entry in metadata for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    parts = []
    for item in flat:
        for kind, symbol, name in ((Ge, "≥", "ge"), (Gt, ">", "gt"), (Le, "≤", "le"), (Lt, "<", "lt")):
            if isinstance(item, kind):
                parts.append(f"{symbol} {_format_bound(getattr(item, name))}")
        if isinstance(item, MinLen):
            parts.append("not empty")
        pattern = getattr(item, "pattern", None)
        if pattern:
            parts.append(f"matches `{pattern}`")
    return ", ".join(parts)


def _format_bound(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def main() -> None:
    """Write docs/recipe.md."""
    OUTPUT.write_text(generate(), encoding="utf-8")
    sys.stdout.write(f"{OUTPUT}: written\n")


if __name__ == "__main__":
    main()
