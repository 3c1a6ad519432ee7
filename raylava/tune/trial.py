"""One trial: a variant's stages, walked within a Ray Tune trial. Holds no CPU and no GPU: its stages ask for their own.

A stage that another trial is building is waited for, not built twice (stages.make).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import tune

from raylava.console import Bar
from raylava.recipe import Recipe
from raylava.session import hush
from raylava.stages import make, stages_of
from raylava.storage import place

_TELL_EVERY_SECONDS = 0.5


def run_trial(config: dict[str, Any]) -> None:
    """Ray Tune's trainable. `config` holds the variant's number, its recipe and storage, and the board to tell."""
    hush()
    teller = _Teller(config["board"], config["trial"])
    recipe: Recipe = config["recipe"]
    ended = "failed"
    try:
        made = [make(stage, teller) for stage in stages_of(recipe, place(config["storage"]))]
        tune.report({"stages": len(made)})
        ended = "done"
    finally:
        ray.get(config["board"].end.remote(config["trial"], ended))


class _Teller:
    """What a stage shows, told to the board (console.Shows)."""

    def __init__(self, board: Any, trial: int) -> None:
        self._board, self._trial = board, trial

    def say(self, text: str) -> None:
        """Nobody reads a trial's lines: what was made is in the artifacts."""

    @contextmanager
    def stage(self, title: str, unit: str) -> Iterator[Bar]:
        self._board.start.remote(self._trial, title)
        yield _BoardBar(self._board, self._trial)


class _BoardBar:
    """Not more often than someone looks."""

    def __init__(self, board: Any, trial: int) -> None:
        self._board, self._trial = board, trial
        self._told = 0.0

    def update(self, done: float, total: float, **figures: float) -> None:
        """See console.Bar."""
        if time.monotonic() - self._told >= _TELL_EVERY_SECONDS:
            self._told = time.monotonic()
            self._board.tell.remote(self._trial, done, total, figures)
