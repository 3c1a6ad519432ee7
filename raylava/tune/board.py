"""Where every trial of a sweep is: trials tell, the driver looks."""

from dataclasses import dataclass, field

import ray


@dataclass
class Where:
    """One trial: what it is doing, how far that is, which stages it made itself. `ended` is how: done or failed."""

    doing: str = "waiting for its turn"
    done: float = 0.0
    total: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    ended: str | None = None


@ray.remote(num_cpus=0)
class Board:
    """The state of each trial, by the variant's number."""

    def __init__(self, trials: int) -> None:
        self._trials = [Where() for _ in range(trials)]

    def start(self, trial: int, stage: str) -> None:
        """A trial sets out to make a stage, which none has made and none is making."""
        where = self._trials[trial]
        where.doing, where.done, where.total, where.figures = stage, 0.0, 0.0, {}
        where.made.append(stage)

    def tell(self, trial: int, done: float, total: float, figures: dict[str, float]) -> None:
        """How far it is with that."""
        where = self._trials[trial]
        where.done, where.total, where.figures = done, total, figures

    def end(self, trial: int, how: str) -> None:
        """A trial ended."""
        self._trials[trial].ended = how

    def look(self) -> list[Where]:
        """All trials."""
        return self._trials
