"""Who is where in a training run: workers heartbeat at each turn of a step, the driver looks for one that fell silent."""

import time
from dataclasses import dataclass

import ray

from raylava.train.backend import COMPUTING, LOADING, SAVING

Update = tuple[int, int, dict[str, float]]  # steps done, steps in all, figures of the last of them


@dataclass(frozen=True)
class Heartbeat:
    """The last a rank told: what it set out to do, in which step, and when (seconds of the watch's clock)."""

    rank: int
    step: int
    doing: str
    at: float


def find_stalled_rank(heartbeats: list[Heartbeat], now: float, patience: float) -> str | None:
    """A line that names the rank which holds the others up, once all have been silent for `patience` seconds.

    Ranks wait for each other in every step: the one that is furthest behind is the cause, the rest are its victims.
    """
    if not heartbeats or any(now - heartbeat.at < patience for heartbeat in heartbeats):
        return None
    order = {LOADING: 0, COMPUTING: 1, SAVING: 2}
    behind = min(heartbeats, key=lambda heartbeat: (heartbeat.step, order[heartbeat.doing], heartbeat.at))
    return f"rank {behind.rank} has been {behind.doing} in step {behind.step} for {now - behind.at:.0f} s"


@ray.remote(num_cpus=0)
class ProgressMonitor:
    """TrialStatus all ranks are, and the figures of each step that nobody has looked at yet."""

    def __init__(self) -> None:
        self._beats: dict[int, Heartbeat] = {}
        self._steps: list[Update] = []

    def heartbeat(self, rank: int, step: int, doing: str) -> None:
        """A rank sets out to do something."""
        self._beats[rank] = Heartbeat(rank, step, doing, time.monotonic())

    def update(self, done: int, total: int, **figures: float) -> None:
        """A step is done."""
        self._steps.append((done, total, figures))

    def poll(self, patience: float) -> tuple[list[Update], str | None]:
        """The `update`s since the last look, in order, and who is silent (None while nobody is)."""
        steps, self._steps = self._steps, []
        return steps, find_stalled_rank(list(self._beats.values()), time.monotonic(), patience)
