"""Failures of workers: which ones a restart can help, after how many a run ends, and which nodes are avoided."""

from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import Checkpoint, UserCallback

from raylava.errors import RunError, first_line

_PEER_DISCONNECTED = (  # messages of collectives whose peer process has exited
    "connection reset by peer",
    "connection closed by peer",
    "connection was likely closed",
    "broken pipe",
    "remote process exit",
    "ncclsystemerror",  # a link or a peer's node; the message does not say which
    "unhandled system error",
    "watchdog",  # a collective that took longer than its time-out
)
_DEVICE_FAILURES = (  # messages after which this process's GPU cannot be used
    "ecc error",
    "fallen off the bus",
    "gpu is lost",
    "unspecified launch failure",
    "nvlink error",
    "hardware stack error",
    "no cuda-capable device",
    "device(s) is/are busy or unavailable",
)


class RestartPolicy(UserCallback):
    """Ends the run after a worker's own error, or after `max_failures` restarts without a new checkpoint between them.

    Ray Train calls it in its controller; an exception raised here is a ControllerError, which ends `fit` without a
    restart. A run that makes progress may lose workers any number of times.
    """

    def __init__(self, monitor: Any, max_failures: int = 8, broken_nodes: int = 0) -> None:
        self._monitor, self._max_failures, self._failures = monitor, max_failures, 0
        self._broken = broken_nodes  # known when the run started
        self._preempted: list[str] = []  # workers whose preemption has been reported

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Start counting anew: all workers have completed a checkpoint."""
        if checkpoint is not None:
            self._failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Count the failure. Raises RunError with the first error that a worker recorded, or after the last attempt.

        After the failure of a GPU the run ends, so that it can continue on other nodes. A worker's error beside the
        death of another one is considered a consequence; an independent error recurs. The death of a preempted worker
        is not counted; Ray Train reports it repeatedly until the node is gone.
        """
        deaths = {rank: _death(error) for rank, error in worker_exceptions.items()}
        lost = [f"worker {rank}" for rank, death in sorted(deaths.items()) if death]
        broken: dict[str, str] = ray.get(self._monitor.broken_nodes.remote())
        if len(broken) > self._broken:
            raise RunError("; ".join(broken.values()))
        recorded: str | None = ray.get(self._monitor.take_error.remote())
        if recorded and not lost:
            raise RunError(recorded)
        if any(death and death.preempted for death in deaths.values()):
            if lost != self._preempted:
                ray.get(self._monitor.record_loss.remote(lost))
            self._preempted = lost
            return
        self._failures, self._preempted = self._failures + 1, []
        lost = lost or [f"a worker that worker {min(worker_exceptions)} can no longer reach"]
        if self._failures > self._max_failures:
            rank = min(worker_exceptions)
            raise RunError(
                f"lost {', '.join(lost)}; {self._failures} failures without a new checkpoint between them "
                f"(worker {rank}: {first_line(worker_exceptions[rank])})"
            )
        ray.get(self._monitor.record_loss.remote(lost))


def _death(error: Exception) -> RayActorError | None:
    """Return Ray's error of a worker whose process or node is gone; None for errors that the worker raised."""
    cause = getattr(error, "health_check_failure", error)
    return cause if isinstance(cause, RayActorError) else None


def is_peer_failure(error: BaseException) -> bool:
    """Return whether the error is a gloo or NCCL collective's report that its peer process has exited.

    Such an error is a consequence; its cause is the peer's own error, or its death.
    """
    from torch.distributed import DistError

    text = str(error).lower()
    is_collective = isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in text)
    return is_collective and any(message in text for message in _PEER_DISCONNECTED)


def is_device_failure(error: BaseException) -> bool:
    """Return whether the error says that this process's GPU has failed, as an uncorrectable memory error does.

    An illegal memory access or a failed assertion on the device is an error of the program.
    """
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(message in text for message in _DEVICE_FAILURES)
