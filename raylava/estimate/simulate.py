"""A training run played through, event by event: steps, checkpoints, nodes that fail or are taken back, restarts.

    goodput = time spent on steps that were kept / all time

Pure and seeded: the same settings give the same run. What a step costs comes from cost/; what is assumed of the world
stands in `FailureModel`. Failures hit nodes independently, at constant rates.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

_DAY = 86_400.0


@dataclass(frozen=True)
class FailureModel:
    """What is assumed. Rates are per node: failures a day (Llama 3's 16,384 H100 saw 419 in 54 days on 2,048 nodes),
    spot reclaims an hour. Seconds: until a loss is noticed, until a new run has started (workers, checkpoint,
    memory dry run), until a lost node is replaced; an elastic run goes on with the rest meanwhile, and starts anew with it.
    `jitter` is the spread of a worker's step (lognormal sigma); a step waits for the slowest.
    """

    failures_per_node_day: float = 419 / 54 / 2048
    reclaims_per_node_hour: float = 0.0
    noticed: float = 60.0
    restart: float = 90.0
    replaced: float = 300.0
    elastic: bool = False
    jitter: float = 0.02


@dataclass(frozen=True)
class Run:
    """A training run on so many nodes. Seconds of a step, of standing still for a checkpoint, and of its upload, in
    which training goes on and nothing is safe yet; `interval` between checkpoints.
    """

    nodes: int
    workers: int
    step: float
    steps: int
    save: float
    upload: float
    interval: float


@dataclass(frozen=True)
class Outcome:
    """What came of a run. Seconds; `goodput` in [0, 1]."""

    seconds: float
    lost: float
    saving: float
    waiting: float
    failures: int
    finished: bool

    @property
    def goodput(self) -> float:
        """Share of the time in which steps were computed that count."""
        return 1.0 - (self.lost + self.saving + self.waiting) / self.seconds


def straggling(jitter: float, workers: int) -> float:
    """How much longer a step takes than one worker's mean: the expected largest of so many lognormal times.

    The quantile at workers/(workers + 1) stands for the expectation (Blom 1958).
    """
    if workers == 1 or jitter == 0:
        return 1.0
    return math.exp(jitter * NormalDist().inv_cdf(workers / (workers + 1)))


def simulate_run(run: Run, world: FailureModel, seed: int, most_days: float = 365.0) -> Outcome:
    """One run, to its end or to so many days."""
    return _Player(run, world, seed).simulate_run(most_days * _DAY)


class _Player:
    """Time moves from event to event: the next loss of a node, the next checkpoint, the end.

    `done` counts seconds of work that is computed, `safe` what the last uploaded checkpoint holds.
    """

    def __init__(self, run: Run, world: FailureModel, seed: int) -> None:
        self._run, self._world = run, world
        self._rng = np.random.default_rng(seed)
        self._step = run.step * straggling(world.jitter, run.workers)
        self._rate = run.nodes * (world.failures_per_node_day / _DAY + world.reclaims_per_node_hour / 3600)
        self._now = self._done = self._safe = 0.0
        self._lost = self._saving = self._waiting = 0.0
        self._failures = 0
        self._uploads: list[tuple[float, float]] = []  # (when it is safe, the work that it holds)
        self._absent: list[float] = []  # when replacements come

    def simulate_run(self, most: float) -> Outcome:
        total = self._run.steps * self._step
        self._wait(self._world.restart)
        while self._done < total and self._now < most:
            if self._train_until_loss(total):
                break
            self._lose()
        finished = self._done >= total
        return Outcome(self._now, self._lost, self._saving, self._waiting, self._failures, finished)

    def _next_loss(self) -> float:
        return float(self._rng.exponential(1 / self._rate)) if self._rate else math.inf

    def _train_until_loss(self, total: float) -> bool:
        """Whether the run ended first."""
        loss = self._now + self._next_loss()
        while True:
            speed = self._speed()
            work = min(self._run.interval * speed, total - self._done)
            took = work / speed
            back = self._absent[0] if self._absent else math.inf
            if back < min(loss, self._now + took):  # all start anew with it, from the last checkpoint
                self._advance(max(0.0, back - self._now), speed)
                heapq.heappop(self._absent)
                self._fall_back()
                self._wait(self._world.restart)
                continue
            if self._now + took > loss:
                self._advance(max(0.0, loss - self._now), speed)
                return False
            self._advance(took, speed)
            if self._done >= total * (1 - 1e-12):  # rounding may leave a trace of work
                self._done = total
                return True
            self._save()

    def _speed(self) -> float:
        """Work a second: what is left of the nodes does it all, where training is elastic."""
        return (self._run.nodes - len(self._absent)) / self._run.nodes

    def _advance(self, seconds: float, speed: float) -> None:
        self._now += seconds
        self._done += seconds * speed

    def _save(self) -> None:
        self._now += self._run.save
        self._saving += self._run.save
        heapq.heappush(self._uploads, (self._now + self._run.upload, self._done))

    def _lose(self) -> None:
        """A node goes, and the work since the last safe checkpoint. The rest goes on, if it may and there is any."""
        self._failures += 1
        self._fall_back()
        world = self._world
        heapq.heappush(self._absent, self._now + world.replaced)
        self._wait(world.noticed)
        if not world.elastic or len(self._absent) == self._run.nodes:
            self._wait(max(0.0, heapq.heappop(self._absent) - self._now))
        self._wait(world.restart)

    def _fall_back(self) -> None:
        while self._uploads and self._uploads[0][0] <= self._now:
            self._safe = max(self._safe, heapq.heappop(self._uploads)[1])
        self._uploads.clear()
        self._lost += self._done - self._safe
        self._done = self._safe

    def _wait(self, seconds: float) -> None:
        self._now += seconds
        self._waiting += seconds


def goodput(run: Run, world: FailureModel, seeds: Sequence[int] = range(16)) -> float:
    """The mean over runs."""
    return float(np.mean([simulate_run(run, world, seed).goodput for seed in seeds]))


def young(save: float, between_failures: float) -> float:
    """The best interval between checkpoints by Young (1974): √(2·δ·M), all in seconds."""
    return math.sqrt(2 * save * between_failures)


def daly(save: float, between_failures: float) -> float:
    """Daly's (2006) higher-order estimate; M where a checkpoint takes longer than 2·M."""
    if save >= 2 * between_failures:
        return between_failures
    ratio = save / (2 * between_failures)
    return math.sqrt(2 * save * between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def between_failures(run: Run, world: FailureModel) -> float:
    """Seconds, of the whole run's nodes together."""
    rate = run.nodes * (world.failures_per_node_day / _DAY + world.reclaims_per_node_hour / 3600)
    return 1 / rate if rate else math.inf


def best_interval(run: Run, world: FailureModel, seeds: Sequence[int] = range(16)) -> float:
    """The interval, in seconds, of the highest goodput of those around Young's; the whole run where nothing fails."""
    mean = between_failures(run, world)
    whole = run.step * run.steps
    if not math.isfinite(mean):
        return whole
    middle = young(max(run.save, 1e-3), mean)
    tried = [min(whole, middle * factor) for factor in np.geomspace(0.125, 8, 25)]
    return float(max(tried, key=lambda interval: goodput(replace(run, interval=interval), world, seeds)))


@dataclass(frozen=True)
class Scaled:
    """A run at one size. `efficiency` is samples a second for each GPU, of those at the smallest size; `bound` the term
    that costs most beside computing; `gain` the speed over the next smaller size, for so much more money.
    """

    workers: int
    run: Run
    outcome: Outcome
    efficiency: float
    gain: float
    bound: str


def scaling(
    sizes: Sequence[int], run_at: Callable[[int], tuple[Run, dict[str, float]]], world: FailureModel, seed: int = 0
) -> list[Scaled]:
    """The run at each number of workers. `run_at` gives it, and a step's seconds by term (`compute` among them)."""
    found: list[Scaled] = []
    for workers in sizes:
        run, terms = run_at(workers)
        outcome = simulate_run(run, world, seed)
        first = found[0] if found else None
        speed = 1 / outcome.seconds
        base = first.workers * first.outcome.seconds if first else workers * outcome.seconds
        gain = found[-1].outcome.seconds * speed if found else 1.0
        besides = terms | _stops(outcome, run)
        besides.pop("compute")
        bound = max(besides, key=lambda name: besides[name])
        found.append(Scaled(workers, run, outcome, base * speed / workers, gain, bound))
    return found


def _stops(outcome: Outcome, run: Run) -> dict[str, float]:
    """Seconds for each step of what interrupts a run."""
    return {
        "checkpoints": outcome.saving / run.steps,
        "lost work": outcome.lost / run.steps,
        "starts": outcome.waiting / run.steps,
    }


def worthwhile_size(scaled: Sequence[Scaled], share: float = 0.5) -> int:
    """The largest number of workers to which scaling pays: each doubling brings at least `share` of what it costs."""
    last = scaled[0].workers
    for before, after in itertools.pairwise(one for one in scaled if one.outcome.finished):
        more = after.workers / before.workers
        if after.gain - 1 < share * (more - 1):
            break
        last = after.workers
    return last
