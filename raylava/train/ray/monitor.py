"""The actor to which all ranks of a run report, and which the driver polls."""

import time
from dataclasses import dataclass

import ray

from raylava.perf.memory import ExecutionConfig
from raylava.train.backend import COMPUTING, LOADING, PUBLISHING, SAVING, STARTING

_PHASES = (STARTING, LOADING, COMPUTING, SAVING, PUBLISHING)
StepUpdate = tuple[int, int, dict[str, float]]  # completed steps, total steps, metrics of the last completed step


@dataclass(frozen=True)
class Heartbeat:
    """The last report of a rank: the phase it entered, in which step, and when (seconds of the monitor's clock)."""

    rank: int
    step: int
    phase: str
    time: float


def find_stalled_rank(heartbeats: list[Heartbeat], now: float, timeout_s: float) -> str | None:
    """Describe the rank that blocks the others, once no rank has sent a heartbeat for `timeout_s` seconds.

    Ranks wait for each other in every step, so the rank that is furthest behind is the cause. A rank that writes the
    result blocks none of them, and loading a model may take five times as long.
    """
    if not heartbeats or any(now - heartbeat.time < timeout_s for heartbeat in heartbeats):
        return None
    stalled = min(heartbeats, key=lambda heartbeat: (heartbeat.step, _PHASES.index(heartbeat.phase), heartbeat.time))
    if stalled.phase == PUBLISHING or (stalled.phase == STARTING and now - stalled.time < 5 * timeout_s):
        return None
    return f"rank {stalled.rank} has been {stalled.phase} in step {stalled.step} for {now - stalled.time:.0f} s"


@dataclass(frozen=True)
class MonitorReport:
    """What happened since the driver's last poll.

    `updates` are the completed steps, in order, `losses` the workers lost at each restart; `stall` describes the
    stalled rank, if there is one. `lines` are to be displayed.
    """

    lines: list[str]
    updates: list[StepUpdate]
    losses: list[list[str]]
    stall: str | None


@ray.remote(num_cpus=0)
class RunMonitor:
    """Actor that collects heartbeats, the metrics of completed steps, and errors of all ranks."""

    def __init__(self) -> None:
        self._heartbeats: dict[int, Heartbeat] = {}
        self._lines: list[str] = []
        self._updates: list[StepUpdate] = []
        self._losses: list[list[str]] = []
        self._first_error: str | None = None
        self._broken_nodes: dict[str, str] = {}
        self._rejected_configs: list[ExecutionConfig] = []

    def report(self, rank: int, step: int, phase: str, seconds: float, updates: list[StepUpdate]) -> None:
        """Record that a rank entered a phase of a step `seconds` ago, and the steps completed since its last report."""
        self._heartbeats[rank] = Heartbeat(rank, step, phase, time.monotonic() - seconds)
        self._updates += updates

    def announce(self, lines: list[str]) -> None:
        """Record lines to be displayed by the driver."""
        self._lines += lines

    def record_error(self, rank: int, message: str) -> None:
        """Record an error of a rank's own, before the rank raises it and the other ranks fail in turn."""
        self._first_error = self._first_error or f"worker {rank}: {message}"

    def take_error(self) -> str | None:
        """Return the first error that a rank recorded since the last call."""
        error, self._first_error = self._first_error, None
        return error

    def record_broken_node(self, node: str, message: str) -> None:
        """Record that a GPU of a node (its id) has failed; the first message is kept."""
        self._broken_nodes.setdefault(node, message)

    def broken_nodes(self) -> dict[str, str]:
        """Return the first message of each node with a failed GPU."""
        return self._broken_nodes

    def reject_config(self, config: ExecutionConfig) -> None:
        """Record that a configuration ran out of memory in the dry run, and that the recipe allows a smaller one."""
        if config not in self._rejected_configs:
            self._rejected_configs.append(config)

    def rejected_configs(self) -> list[ExecutionConfig]:
        """Return the configurations that ran out of memory."""
        return self._rejected_configs

    def start_attempt(self) -> None:
        """Forget the ranks of an earlier group of workers, whose number may have been another."""
        self._heartbeats.clear()

    def record_loss(self, workers: list[str]) -> None:
        """Record a failure after which Ray Train restarts the workers."""
        self._losses.append(workers)

    def poll(self, timeout_s: float) -> MonitorReport:
        """Return what happened since the last poll."""
        stall = find_stalled_rank(list(self._heartbeats.values()), time.monotonic(), timeout_s)
        report = MonitorReport(self._lines, self._updates, self._losses, stall)
        self._lines, self._updates, self._losses = [], [], []
        return report
