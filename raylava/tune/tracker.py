"""Where every trial of a sweep is: trials tell, the driver looks."""

from dataclasses import dataclass, field

import ray


@dataclass
class TrialStatus:
    """One trial: its variant in words, what it is doing, how far that is, which stages it made itself.

    `ended` is how: done, stopped (early) or failed. `since` is when (seconds of the epoch) and where it was first heard
    of in its stage, so that a rate can be told.
    """

    variant: str
    doing: str = "starting"
    done: float = 0.0
    total: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    ended: str | None = None
    since: tuple[float, float] | None = None


@ray.remote(num_cpus=0)
class TrialTracker:
    """The state of each trial, by number, and the recipe it is to make."""

    def __init__(self) -> None:
        self._trials: list[TrialStatus] = []
        self._recipes: list[str] = []

    def join(self, variant: str, recipe: str) -> int:
        """A trial is about to begin; its number. `recipe` is JSON."""
        self._trials.append(TrialStatus(variant))
        self._recipes.append(recipe)
        return len(self._trials) - 1

    def recipe(self, trial: int) -> str:
        """What the trial is to make."""
        return self._recipes[trial]

    def start(self, trial: int, stage: str) -> None:
        """A trial sets out to make a stage, which none has made and none is making."""
        where = self._trials[trial]
        where.doing, where.done, where.total, where.figures, where.since = stage, 0.0, 0.0, {}, None
        where.made.append(stage)

    def tell(self, trial: int, done: float, total: float, figures: dict[str, float], at: float) -> None:
        """How far it is with that, `at` so many seconds of the epoch."""
        where = self._trials[trial]
        where.done, where.total, where.figures = done, total, figures
        where.since = where.since or (at, done)

    def end(self, trial: int, how: str) -> None:
        """A trial ended."""
        self._trials[trial].ended = how

    def look(self) -> list[TrialStatus]:
        """All trials, in the order they began."""
        return self._trials
