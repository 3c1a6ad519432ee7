"""Which failures of a training are losses of workers, to go on after, and which are its own, to stop at."""

import pytest
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from torch.distributed import DistBackendError, DistNetworkError

from raylava.errors import RunError
from raylava.train.ray_backend import lost_workers

RESET = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:45456: Connection reset by peer. GLHF!")
CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.4]:2211")
NCCL = DistBackendError(
    "NCCL error: ncclRemoteError: A call failed possibly due to a remote process exiting prematurely"
)
STORE = DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?")
DEAD = WorkerHealthCheckFailedError("the worker died", RayActorError())


def failed(**workers: Exception) -> WorkerGroupError:
    """A failure of workers: rank0=… raised it; what Ray itself found comes as it is."""
    failures = {
        int(name.removeprefix("rank")): error
        if isinstance(error, WorkerHealthCheckFailedError)
        else UserExceptionWithTraceback(error, "a traceback")
        for name, error in workers.items()
    }
    return WorkerGroupError("it failed", failures)


def test_a_worker_that_ray_finds_dead_is_lost_whatever_the_others_raised() -> None:
    assert lost_workers(failed(rank0=RESET, rank1=DEAD)) == ["worker 1"]
    assert lost_workers(failed(rank0=DEAD, rank1=RunError("stopped"), rank2=DEAD)) == ["worker 0", "worker 2"]


@pytest.mark.parametrize("error", [RESET, CLOSED, NCCL, STORE], ids=["reset", "closed", "nccl", "store"])
def test_a_worker_that_only_the_others_miss_is_lost_before_ray_knows(error: Exception) -> None:
    """A node that dies is known to the ranks at once, to Ray when it is next looked at."""
    assert lost_workers(failed(rank0=error)) == ["a worker that worker 0 no longer reaches"]
    assert lost_workers(failed(rank2=RESET, rank3=error)) == ["a worker that worker 2 no longer reaches"]


@pytest.mark.parametrize(
    "error",
    [
        RunError("5 steps in a row were not finite"),
        RuntimeError("shapes cannot be multiplied"),
        OSError("storage: connection reset by peer"),
        RuntimeError("storage: connection reset by peer"),
        DistBackendError("NCCL error: invalid usage"),
    ],
    ids=str,
)
def test_an_error_of_its_own_is_no_loss_even_where_others_then_miss_that_rank(error: Exception) -> None:
    assert lost_workers(failed(rank0=error)) == []
    assert lost_workers(failed(rank0=RESET, rank1=error)) == []
