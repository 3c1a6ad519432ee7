"""How trials end: what a study knows of one, and what a sweep tells of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raylava.tune.variants import Variant

LOST = "its process was lost again and again"


@dataclass(frozen=True)
class TrialRecord:
    """A trial of a study: its settings, how it ended (None while it runs), why it failed, what it reached.

    `values` are the objectives, once it is done; `losses` the finetuning loss by mark.
    """

    number: int
    settings: Mapping[str, Any]
    ended: str | None
    failure: str | None
    values: Mapping[str, float]
    losses: Mapping[int, float]


@dataclass(frozen=True)
class TrialResult:
    """A variant with all its settings, and how its trial ended: done, stopped (early) or failed, and why.

    `tried` is what its study knows of it, when it is of a search.
    """

    variant: Variant
    how: str
    failure: str | None = None
    tried: TrialRecord | None = None
    is_recipe: bool = True  # False where a search gave settings that are none; the variant then has the base's recipe
