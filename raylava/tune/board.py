"""Where every trial of a sweep is: trials tell, the driver looks."""

from dataclasses import dataclass, field

import ray


@dataclass
class Where:
    """One trial: what it is doing, and how far that is. `ended` is how: done or failed."""

    doing: str = "waiting for its turn"
    done: float = 0.0
    total: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    ended: str | None = None


@ray.remote(num_cpus=0)
class Board:
    """The state of each trial, by the variant's number."""

    def __init__(self, trials: int) -> None:
        self._trials = [Where() for _ in range(trials)]

    def tell(self, trial: int, doing: str, done: float, total: float, figures: dict[str, float]) -> None:
        """A trial moved."""
        self._trials[trial] = Where(doing, done, total, figures)

    def end(self, trial: int, how: str) -> None:
        """A trial ended."""
        self._trials[trial].ended = how

    def look(self) -> list[Where]:
        """All trials."""
        return self._trials
