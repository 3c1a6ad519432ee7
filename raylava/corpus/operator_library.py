"""The operators that raylava ships, and the loading of those that a recipe lists, also of `module:function`."""

import hashlib
import importlib
import inspect
import os
import re
import sys
import types
import typing
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from raylava.config.recipe import OperatorConfig
from raylava.corpus.image_hash import difference_hash, differing_bits
from raylava.corpus.operators import DuplicateKey, Operator, deduplicates, reads_images
from raylava.corpus.rows import SourceRow
from raylava.errors import UserError, first_line
from raylava.models.templates import IMAGE_TOKEN

DECONTAMINATE = "decontaminate"
_MAX_DISTANCE = 7  # bits; beyond that unrelated images of similar layout are equal
_COMPARED_PARTS = ("row", "text", "image")


def answer_words(row: SourceRow, minimum: int = 1, maximum: int | None = None) -> SourceRow | None:
    """Keep rows whose answers have `minimum` to `maximum` words together."""
    words = sum(len(turn.text.split()) for turn in row.turns if turn.speaker == "gpt")
    return row if minimum <= words and (maximum is None or words <= maximum) else None


def without_pattern(row: SourceRow, pattern: str) -> SourceRow | None:
    """Keep rows in which no turn matches the regular expression `pattern`."""
    return None if any(re.search(pattern, turn.text) for turn in row.turns) else row


def without_repetition(row: SourceRow, words: int = 5, max_fraction: float = 0.3) -> SourceRow | None:
    """Keep rows in whose answers repeated sequences of `words` words make up at most `max_fraction` of all of them."""
    counts: Counter[tuple[str, ...]] = Counter()
    for turn in row.turns:
        if turn.speaker == "gpt":
            split = turn.text.split()
            counts.update(tuple(split[start : start + words]) for start in range(len(split) - words + 1))
    repeated = sum(count - 1 for count in counts.values())
    return row if repeated <= max_fraction * max(1, counts.total()) else None


def first_exchanges(row: SourceRow, count: int) -> SourceRow:
    """Keep the first `count` questions and answers of each row, and the images that they refer to."""
    turns = row.turns[: 2 * count]
    return replace(row, turns=turns, images=row.images[: sum(turn.text.count(IMAGE_TOKEN) for turn in turns)])


@deduplicates
@reads_images
def exact_duplicates(row: SourceRow, images: Sequence[bytes], compare: str = "row") -> DuplicateKey | None:
    """Keep the first of rows with equal `compare`: row (texts and image files), text, or image."""
    if compare == "image" and not row.images:
        return None
    content = hashlib.sha256()
    if compare != "image":
        content.update(_text_digest(row))
    if compare != "text":
        for image in images:
            content.update(hashlib.sha256(image).digest())
    return DuplicateKey(content.digest()[:16])


@deduplicates
@reads_images
def similar_duplicates(
    row: SourceRow, images: Sequence[bytes], compare: str = "row", distance: int = 3
) -> DuplicateKey | None:
    """Keep the first of rows whose images look alike and, with `compare: row`, whose texts are equal.

    First images whose perceptual hashes differ in at most `distance` of 64 bits look alike; those of further images
    must be equal. A row without images is compared by its text; with `compare: image` it has no duplicates.
    """
    hashes = [difference_hash(image) for image in images]
    if compare == "image" and not hashes:
        return None
    group = hashlib.sha256(b"" if compare == "image" else _text_digest(row))
    group.update(repr(hashes[1:]).encode())
    return DuplicateKey(group.digest()[:16], hashes[0] if hashes else 0)


def _text_digest(row: SourceRow) -> bytes:
    digest = hashlib.sha256()
    for turn in row.turns:
        digest.update(f"{turn.speaker}\0{turn.text.strip()}\0".encode(errors="surrogatepass"))
    return digest.digest()


@reads_images
def decontaminate(
    row: SourceRow, images: Sequence[bytes], benchmarks: npt.NDArray[np.uint64], distance: int = 2
) -> SourceRow | None:
    """Keep rows none of whose images looks like an image of the recipe's `benchmarks`, a list of their names.

    Images whose perceptual hashes differ in at most `distance` of 64 bits look alike. `benchmarks` are the names in the
    recipe and, when the operator runs, the hashes of their images, shape (images,).
    """
    for image in images:
        if len(benchmarks) and differing_bits(benchmarks, difference_hash(image)).min() <= distance:
            return None
    return row


def _validate_compare(compare: str = "row", distance: int = 0) -> None:
    if compare not in _COMPARED_PARTS:
        raise ValueError(f"compare={compare!r}; choose one of: {', '.join(_COMPARED_PARTS)}")
    _validate_distance(distance)


def _validate_similar(compare: str = "row", distance: int = 3) -> None:
    if compare == "text":
        raise ValueError("compare='text' needs no images; use exact_duplicates")
    _validate_compare(compare, distance)


def _validate_decontaminate(benchmarks: Any, distance: int = 2) -> None:
    if not isinstance(benchmarks, list) or not benchmarks or not all(isinstance(name, str) for name in benchmarks):
        raise ValueError(f"benchmarks={benchmarks!r} must be a list of names of the recipe's evaluate")
    _validate_distance(distance)


def _validate_distance(distance: int) -> None:
    if not 0 <= distance <= _MAX_DISTANCE:
        raise ValueError(f"distance={distance} must be 0 to {_MAX_DISTANCE} bits")


def _validate_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is not a regular expression: {error}") from error


OPERATORS: dict[str, Callable[..., Any]] = {
    "answer_words": answer_words,
    "without_pattern": without_pattern,
    "without_repetition": without_repetition,
    "first_exchanges": first_exchanges,
    "exact_duplicates": exact_duplicates,
    "similar_duplicates": similar_duplicates,
    DECONTAMINATE: decontaminate,
}
_PLAIN_TYPES = {bool, int, float, str, type(None)}
_VALIDATORS: dict[str, Callable[..., None]] = {
    "without_pattern": _validate_pattern,
    "exact_duplicates": _validate_compare,
    "similar_duplicates": _validate_similar,
    DECONTAMINATE: _validate_decontaminate,
}


def compared_benchmarks(operators: Sequence[Operator]) -> list[str]:
    """Return the names of the benchmarks with whose images operators compare rows."""
    comparing = (operator for operator in operators if operator.name == DECONTAMINATE)
    return list(dict.fromkeys(name for operator in comparing for name in operator.arguments["benchmarks"]))


def check_compared_benchmarks(operators: Sequence[Operator], known: Collection[str], key: str) -> None:
    """Raise UserError, which names the recipe's `key`, unless all compared benchmarks are among the `known`."""
    for name in compared_benchmarks(operators):
        if name not in known:
            choices = ", ".join(known) or "none is there"
            raise UserError(f"{key}: {name!r} is no benchmark of evaluate; choose one of: {choices}")


def load_operators(configs: Sequence[OperatorConfig], key: str) -> list[Operator]:
    """Return the operators that a recipe lists at `key`. Raises UserError for one that cannot be called as listed."""
    return [_load(config, key) for config in configs]


def _load(config: OperatorConfig, key: str) -> Operator:
    if ":" in config.name:
        function, source_sha256 = _import(config.name, key)
        operator = Operator(config.name, function, config.arguments, source_sha256)
    elif config.name in OPERATORS:
        operator = Operator(config.name, OPERATORS[config.name], config.arguments)
    else:
        known = ", ".join(OPERATORS)
        raise UserError(f"{key}: unknown operator {config.name!r}; choose one of: {known}; or give module:function")
    try:
        images = [()] if operator.reads_images else []
        inspect.signature(operator.function).bind(None, *images, **operator.arguments)
        _check_types(operator)
        if config.name in _VALIDATORS:
            _VALIDATORS[config.name](**operator.arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: {config.name} does not take these arguments: {error}; fix them") from error
    return operator


def _check_types(operator: Operator) -> None:
    """Raise TypeError for an argument of another type than the function's annotation, if that names plain types."""
    try:
        annotations = typing.get_type_hints(operator.function)
    except Exception:  # a user's annotation may name what only a type checker imports
        return
    for name, value in operator.arguments.items():
        annotation = annotations.get(name)
        is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        accepted = typing.get_args(annotation) if is_union else (annotation,)
        if (
            set(accepted) <= _PLAIN_TYPES
            and type(value) not in accepted
            and not (type(value) is int and float in accepted)
        ):
            expected = " or ".join(kind.__name__ for kind in accepted if kind is not type(None))
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}, not {expected}")


def _import(name: str, key: str) -> tuple[Callable[..., Any], str]:
    """Import `module:function`, also from the current directory; return also the SHA-256 of the module's source.

    The source includes the helpers that the function calls there.
    """
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
        function, source = getattr(module, function_name), inspect.getsource(module)
    except Exception as error:  # the import runs the user's code
        raise UserError(
            f"{key}: {name} cannot be imported ({first_line(error)}); its module must be written in Python, and be "
            "installed or lie in the current directory"
        ) from error
    if not callable(function):
        raise UserError(f"{key}: {name} is a {type(function).__name__}; name a function")
    return function, hashlib.sha256(source.encode()).hexdigest()
