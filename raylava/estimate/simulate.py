"""Discrete-event simulation of a training run: steps, checkpoints, node failures, spot reclaims and restarts.

    goodput = time spent on steps whose work was not lost / total time

Pure and seeded: the same arguments give the same run. Step times come from raylava.perf; the other assumptions are
fields of `FailureModel`. Failures hit nodes independently, at constant rates.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

_DAY_S = 86_400.0


@dataclass(frozen=True)
class FailureModel:
    """Assumptions about node losses and restarts.

    Rates are per node: failures per day (by default those of Llama 3: 16,384 H100 on 2,048 nodes had 419 in 54 days)
    and spot reclaims per hour. `detection_s` passes until a loss is noticed, `restart_s` until the run has started
    again (workers, checkpoint, memory dry run), `replacement_s` until a lost node is replaced. Meanwhile an elastic run
    continues on the remaining nodes, and restarts when the replacement joins. `jitter` is the spread of a worker's step
    time (lognormal sigma); every step waits for the slowest worker.
    """

    failures_per_node_day: float = 419 / 54 / 2048
    reclaims_per_node_hour: float = 0.0
    detection_s: float = 60.0
    restart_s: float = 90.0
    replacement_s: float = 300.0
    elastic: bool = False
    jitter: float = 0.02


@dataclass(frozen=True)
class TrainingRun:
    """A training run of `steps` steps on `nodes` nodes.

    Training stalls for `checkpoint_stall_s` per checkpoint and then continues during the upload; the checkpoint can be
    restored only after `upload_s`. `checkpoint_interval_s` is the time between checkpoints.
    """

    nodes: int
    workers: int
    step_time_s: float
    steps: int
    checkpoint_stall_s: float
    upload_s: float
    checkpoint_interval_s: float


@dataclass(frozen=True)
class RunOutcome:
    """The result of a simulated run: where its `total_s` seconds went, and how many nodes were lost.

    `lost_work_s` is work that was repeated, `checkpoint_stall_s` the stalls for checkpoints, and `downtime_s` the time
    for detection, replacement and (re)starts.
    """

    total_s: float
    lost_work_s: float
    checkpoint_stall_s: float
    downtime_s: float
    node_losses: int
    finished: bool

    @property
    def goodput(self) -> float:
        """Fraction of the total time spent on steps whose work was not lost, in [0, 1]."""
        return 1.0 - (self.lost_work_s + self.checkpoint_stall_s + self.downtime_s) / self.total_s


def straggler_factor(jitter: float, workers: int) -> float:
    """Return the duration of a step relative to one worker's mean: the expected maximum of lognormal step times.

    The expectation is approximated by the quantile at workers/(workers + 1) (Blom 1958).
    """
    if workers == 1 or jitter == 0:
        return 1.0
    return math.exp(jitter * NormalDist().inv_cdf(workers / (workers + 1)))


def simulate_run(run: TrainingRun, failures: FailureModel, seed: int, max_days: float = 365.0) -> RunOutcome:
    """Simulate one run until it finishes, or until `max_days` days have passed."""
    return _Simulation(run, failures, seed).run(max_days * _DAY_S)


class _Simulation:
    """Advances time from event to event: a node loss, a checkpoint, the return of a node, the end of the run.

    `_done` is the computed work in seconds, `_safe` the work contained in the last uploaded checkpoint.
    """

    def __init__(self, run: TrainingRun, failures: FailureModel, seed: int) -> None:
        self._run, self._failures = run, failures
        self._rng = np.random.default_rng(seed)
        self._step_time = run.step_time_s * straggler_factor(failures.jitter, run.workers)
        self._loss_rate = _node_losses_per_second(run, failures)
        self._now = self._done = self._safe = 0.0
        self._lost_work = self._checkpoint_stall = self._downtime = 0.0
        self._node_losses = 0
        self._uploads: list[tuple[float, float]] = []  # (time of completion, work in the checkpoint)
        self._replacements: list[float] = []  # times at which missing nodes are replaced

    def run(self, max_seconds: float) -> RunOutcome:
        total_work = self._run.steps * self._step_time
        self._wait(self._failures.restart_s)
        while self._done < total_work and self._now < max_seconds:
            if self._train_until_loss(total_work):
                break
            self._lose_node()
        finished = self._done >= total_work
        return RunOutcome(
            self._now, self._lost_work, self._checkpoint_stall, self._downtime, self._node_losses, finished
        )

    def _seconds_to_next_loss(self) -> float:
        return float(self._rng.exponential(1 / self._loss_rate)) if self._loss_rate else math.inf

    def _train_until_loss(self, total_work: float) -> bool:
        """Train until the next node loss or the end of the run; return whether the run ended first."""
        loss_time = self._now + self._seconds_to_next_loss()
        while True:
            speed = self._speed()
            work = min(self._run.checkpoint_interval_s * speed, total_work - self._done)
            duration = work / speed
            rejoin_time = self._replacements[0] if self._replacements else math.inf
            if rejoin_time < min(loss_time, self._now + duration):  # all restart with it, from the last checkpoint
                self._train(max(0.0, rejoin_time - self._now), speed)
                heapq.heappop(self._replacements)
                self._restore_checkpoint()
                self._wait(self._failures.restart_s)
                continue
            if self._now + duration > loss_time:
                self._train(max(0.0, loss_time - self._now), speed)
                return False
            self._train(duration, speed)
            if self._done >= total_work * (1 - 1e-12):  # tolerates rounding errors
                self._done = total_work
                return True
            self._save_checkpoint()

    def _speed(self) -> float:
        """Return the work per second: the fraction of nodes present, which do all of it in an elastic run."""
        return (self._run.nodes - len(self._replacements)) / self._run.nodes

    def _train(self, seconds: float, speed: float) -> None:
        self._now += seconds
        self._done += seconds * speed

    def _save_checkpoint(self) -> None:
        self._now += self._run.checkpoint_stall_s
        self._checkpoint_stall += self._run.checkpoint_stall_s
        heapq.heappush(self._uploads, (self._now + self._run.upload_s, self._done))

    def _lose_node(self) -> None:
        """Lose a node and the work since the last safe checkpoint.

        An elastic run continues if any node remains; others wait for the replacement.
        """
        self._node_losses += 1
        self._restore_checkpoint()
        failures = self._failures
        heapq.heappush(self._replacements, self._now + failures.replacement_s)
        self._wait(failures.detection_s)
        if not failures.elastic or len(self._replacements) == self._run.nodes:
            self._wait(max(0.0, heapq.heappop(self._replacements) - self._now))
        self._wait(failures.restart_s)

    def _restore_checkpoint(self) -> None:
        while self._uploads and self._uploads[0][0] <= self._now:
            self._safe = max(self._safe, heapq.heappop(self._uploads)[1])
        self._uploads.clear()
        self._lost_work += self._done - self._safe
        self._done = self._safe

    def _wait(self, seconds: float) -> None:
        self._now += seconds
        self._downtime += seconds


def mean_goodput(run: TrainingRun, failures: FailureModel, seeds: Sequence[int] = range(16)) -> float:
    """Return the goodput averaged over simulations with the given seeds."""
    return float(np.mean([simulate_run(run, failures, seed).goodput for seed in seeds]))


def young_interval(checkpoint_s: float, mtbf_s: float) -> float:
    """Return the optimal time between checkpoints by Young (1974), √(2·δ·M), in seconds.

    δ is the duration of a checkpoint, M the mean time between failures.
    """
    return math.sqrt(2 * checkpoint_s * mtbf_s)


def daly_interval(checkpoint_s: float, mtbf_s: float) -> float:
    """Return the optimal time between checkpoints by Daly's (2006) higher-order estimate, in seconds.

    It is the mean time between failures if a checkpoint takes at least twice as long.
    """
    if checkpoint_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = checkpoint_s / (2 * mtbf_s)
    return math.sqrt(2 * checkpoint_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint_s


def mean_time_between_failures(run: TrainingRun, failures: FailureModel) -> float:
    """Return the mean time between node losses of the whole run, in seconds; infinite if no node is ever lost."""
    rate = _node_losses_per_second(run, failures)
    return 1 / rate if rate else math.inf


def _node_losses_per_second(run: TrainingRun, failures: FailureModel) -> float:
    return run.nodes * (failures.failures_per_node_day / _DAY_S + failures.reclaims_per_node_hour / 3600)


def best_interval(run: TrainingRun, failures: FailureModel, seeds: Sequence[int] = range(16)) -> float:
    """Return the time between checkpoints with the highest simulated goodput, in seconds.

    Searches around Young's interval; returns the duration of the whole run if no node is ever lost.
    """
    mtbf_s = mean_time_between_failures(run, failures)
    run_s = run.step_time_s * run.steps
    if not math.isfinite(mtbf_s):
        return run_s
    center = young_interval(max(run.checkpoint_stall_s, 1e-3), mtbf_s)
    intervals = [min(run_s, center * factor) for factor in np.geomspace(0.125, 8, 25)]
    return float(
        max(
            intervals,
            key=lambda interval: mean_goodput(replace(run, checkpoint_interval_s=interval), failures, seeds),
        )
    )


@dataclass(frozen=True)
class ScaledRun:
    """A simulated run at one size.

    `efficiency` is the throughput per worker relative to the smallest size; `speedup` is the speed relative to the next
    smaller size; `bottleneck` is the largest term of the step time besides compute.
    """

    workers: int
    run: TrainingRun
    outcome: RunOutcome
    efficiency: float
    speedup: float
    bottleneck: str


def scale_run(
    sizes: Sequence[int],
    run_at: Callable[[int], tuple[TrainingRun, dict[str, float]]],
    failures: FailureModel,
    seed: int = 0,
) -> list[ScaledRun]:
    """Simulate the run at each number of workers in `sizes`.

    `run_at` returns the run at a size, and its step time in seconds by term (`compute` among them).
    """
    runs: list[ScaledRun] = []
    for workers in sizes:
        run, terms = run_at(workers)
        outcome = simulate_run(run, failures, seed)
        smallest = runs[0] if runs else None
        speed = 1 / outcome.total_s
        base = smallest.workers * smallest.outcome.total_s if smallest else workers * outcome.total_s
        speedup = runs[-1].outcome.total_s * speed if runs else 1.0
        overheads = terms | _interruptions(outcome, run)
        overheads.pop("compute")
        bottleneck = max(overheads, key=lambda name: overheads[name])
        runs.append(ScaledRun(workers, run, outcome, base * speed / workers, speedup, bottleneck))
    return runs


def _interruptions(outcome: RunOutcome, run: TrainingRun) -> dict[str, float]:
    """Return the seconds per step that the run was interrupted, by cause."""
    return {
        "checkpoints": outcome.checkpoint_stall_s / run.steps,
        "lost work": outcome.lost_work_s / run.steps,
        "restarts": outcome.downtime_s / run.steps,
    }


def worthwhile_size(runs: Sequence[ScaledRun], min_return: float = 0.5) -> int:
    """Return the largest number of workers up to which scaling is worthwhile.

    Each increase in workers must yield at least `min_return` of its proportional speedup; unfinished runs are skipped.
    """
    size = runs[0].workers
    for smaller, larger in itertools.pairwise(run for run in runs if run.outcome.finished):
        ratio = larger.workers / smaller.workers
        if larger.speedup - 1 < min_return * (ratio - 1):
            break
        size = larger.workers
    return size
