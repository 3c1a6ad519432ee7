"""Operators of a corpus: functions that filter, change, split and de-duplicate its rows before they are tokenized.

A row operator is a pure function of one row; it returns a row, several rows, or None to filter the row out. A
de-duplication operator returns the row's DuplicateKey; of rows with equal keys the first in source order stays (see
deduplication.py). operator_library.py has raylava's operators, and imports those of the user.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from raylava.corpus.quarantine import BadRow, Reason, describe_error
from raylava.corpus.row_images import RowImages
from raylava.corpus.rows import SourceRow

_MARK = "raylava_operator"  # attribute of a function that a decorator of this module has marked

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class DuplicateKey:
    """What two duplicates have in common: the same `group`, and image hashes (64 bits) that differ in few bits.

    The operator's argument `distance` says in how many; 0 without such an argument.
    """

    group: bytes
    image_hash: int = 0


@dataclass(frozen=True)
class _Mark:
    reads_images: bool
    deduplicates: bool


def reads_images(function: Function) -> Function:
    """Mark an operator that takes the encoded images of the row as its second argument, a sequence of bytes."""
    setattr(function, _MARK, _Mark(reads_images=True, deduplicates=_mark(function).deduplicates))
    return function


def deduplicates(function: Function) -> Function:
    """Mark an operator that returns a row's DuplicateKey, or None for a row that has no duplicates."""
    setattr(function, _MARK, _Mark(reads_images=_mark(function).reads_images, deduplicates=True))
    return function


def _mark(function: Callable[..., Any]) -> _Mark:
    mark = getattr(function, _MARK, _Mark(reads_images=False, deduplicates=False))
    assert isinstance(mark, _Mark)
    return mark


class FilteredRow(Exception):
    """Raised for a row that an operator filters out. `reason` is stored in quarantine.csv and in the manifest."""

    def __init__(self, operator: str, detail: str = "") -> None:
        super().__init__(operator)
        self.reason, self.detail = f"filtered by {operator}", detail


@dataclass(frozen=True)
class Operator:
    """An operator of a recipe: its function, and the arguments that the recipe gives it.

    `source_sha256` is that of the module of a user's function, empty for raylava's own.
    """

    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    source_sha256: str = ""

    @property
    def reads_images(self) -> bool:
        """Whether the function takes the row's images."""
        return _mark(self.function).reads_images

    @property
    def uses_images(self) -> bool:
        """Whether the function may read the images that it takes; with `compare: text` it does not."""
        return self.reads_images and self.arguments.get("compare") != "text"

    @property
    def deduplicates(self) -> bool:
        """Whether the function returns a DuplicateKey."""
        return _mark(self.function).deduplicates

    @property
    def distance(self) -> int:
        """Number of bits in which the image hashes of duplicates may differ."""
        parameter = inspect.signature(self.function).parameters.get("distance")
        default = 0 if parameter is None or parameter.default is parameter.empty else parameter.default
        return int(self.arguments.get("distance", default))

    def bind(self, **arguments: Any) -> "Operator":
        """Return the operator with other values for some of its arguments."""
        return replace(self, arguments={**self.arguments, **arguments})

    def _call(self, row: SourceRow, images: Sequence[bytes]) -> Any:
        """Call the function, and run it to its end if it is a generator."""
        result = self.function(row, *([images] if self.reads_images else []), **self.arguments)
        return list(result) if isinstance(result, Iterable) else result

    @contextmanager
    def _errors_of_the_row(self) -> Iterator[None]:
        """Turn any error but those of storage and memory into a BadRow that names the operator."""
        try:
            yield
        except (BadRow, OSError, MemoryError):
            raise
        except Exception as error:
            raise BadRow(Reason.FAILED, f"operator {self.name}: {describe_error(error)}") from error

    def rows(self, row: SourceRow, images: Sequence[bytes]) -> Sequence[SourceRow]:
        """Return the rows that a row operator makes of a row. Raises FilteredRow if there are none, and BadRow.

        Several rows get ids of their own (`ID/0`, `ID/1`, …), so that ids stay unique in the corpus.
        """
        with self._errors_of_the_row():
            result = self._call(row, images)
        results = [] if result is None else result if isinstance(result, list) else [result]
        for value in results:
            if not isinstance(value, SourceRow):
                raise BadRow(Reason.FAILED, f"operator {self.name} returned a {type(value).__name__}, not a SourceRow")
        if not results:
            raise FilteredRow(self.name)
        if len(results) == 1:
            return [replace(results[0], sample_id=row.sample_id)]
        return [replace(value, sample_id=f"{row.sample_id}/{number}") for number, value in enumerate(results)]

    def key(self, row: SourceRow, images: Sequence[bytes]) -> DuplicateKey | None:
        """Return the key that a de-duplication operator gives to a row. Raises BadRow."""
        with self._errors_of_the_row():
            key = self._call(row, images)
        is_key = isinstance(key, DuplicateKey) and isinstance(key.group, bytes) and 0 <= key.image_hash < 1 << 64
        if key is not None and not is_key:
            raise BadRow(Reason.FAILED, f"operator {self.name} returned {key!r}, not a DuplicateKey"[:200])
        return key


RowOutcome = tuple[SourceRow, BadRow | FilteredRow | None]


@dataclass(frozen=True)
class OperatorChain:
    """The operators of a corpus in their order.

    `verdicts` maps the position of a de-duplication operator to the rows that it takes out, by sample id: duplicates,
    and rows that could not be compared. It lacks the operators that have not been run yet.
    """

    operators: Sequence[Operator]
    verdicts: Mapping[int, Mapping[str, BadRow | FilteredRow]] = field(default_factory=dict)

    def apply(
        self, row: SourceRow, read_image: Callable[[str | bytes], bytes], stop: int | None = None
    ) -> Iterator[RowOutcome]:
        """Yield the rows that the first `stop` operators (all, without it) make of a row.

        A row that was filtered out, or cannot be used, comes with the reason.
        """
        end = len(self.operators) if stop is None else stop
        return self._apply_from(0, end, row, read_image)

    def _apply_from(
        self, position: int, end: int, row: SourceRow, read_image: Callable[[str | bytes], bytes]
    ) -> Iterator[RowOutcome]:
        if position == end:
            yield row, None
            return
        try:
            results = self._step(position, row, read_image)
        except (BadRow, FilteredRow) as problem:
            yield row, problem
            return
        for result in results:
            yield from self._apply_from(position + 1, end, result, read_image)

    def _step(self, position: int, row: SourceRow, read_image: Callable[[str | bytes], bytes]) -> Sequence[SourceRow]:
        operator = self.operators[position]
        if not operator.deduplicates:
            return operator.rows(row, RowImages(row.images, read_image))
        problem = self.verdicts[position].get(row.sample_id)
        if problem is not None:
            raise problem
        return [row]
