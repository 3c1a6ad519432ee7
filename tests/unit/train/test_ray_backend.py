"""Lost workers are distinguished from errors of the run itself, and the stalled rank is named."""

import pytest
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from torch.distributed import DistBackendError, DistNetworkError

from raylava.errors import RunError
from raylava.train.backend import COMPUTING, LOADING
from raylava.train.ray_backend import Heartbeat, find_stalled_rank, lost_workers

RESET = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:45456: Connection reset by peer. GLHF!")
CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.4]:2211")
NCCL = DistBackendError(
    "NCCL error: ncclRemoteError: A call failed possibly due to a remote process exiting prematurely"
)
STORE = DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?")
DEAD = WorkerHealthCheckFailedError("the worker died", RayActorError())


def training_failure(**errors: Exception) -> WorkerGroupError:
    """Return Ray Train's error for the errors of rank0=…, rank1=…; those that workers raised get Ray's wrapper."""
    failures = {
        int(name.removeprefix("rank")): error
        if isinstance(error, WorkerHealthCheckFailedError)
        else UserExceptionWithTraceback(error, "a traceback")
        for name, error in errors.items()
    }
    return WorkerGroupError("it failed", failures)


def test_worker_that_ray_reports_dead_is_lost_whatever_errors_other_workers_raised() -> None:
    assert lost_workers(training_failure(rank0=RESET, rank1=DEAD)) == ["worker 1"]
    failure = training_failure(rank0=DEAD, rank1=RunError("stopped"), rank2=DEAD)
    assert lost_workers(failure) == ["worker 0", "worker 2"]


@pytest.mark.parametrize("error", [RESET, CLOSED, NCCL, STORE], ids=["reset", "closed", "nccl", "store"])
def test_peer_disconnect_on_all_failed_ranks_means_a_lost_worker_before_ray_reports_it(error: Exception) -> None:
    """The other ranks notice a dead node immediately, Ray only at its next health check."""
    assert lost_workers(training_failure(rank0=error)) == ["a worker that worker 0 can no longer reach"]
    assert lost_workers(training_failure(rank2=RESET, rank3=error)) == ["a worker that worker 2 can no longer reach"]


@pytest.mark.parametrize(
    "error",
    [
        RunError("5 consecutive steps had a non-finite loss"),
        RuntimeError("shapes cannot be multiplied"),
        OSError("storage: connection reset by peer"),
        RuntimeError("storage: connection reset by peer"),
        DistBackendError("NCCL error: invalid usage"),
    ],
    ids=str,
)
def test_error_of_the_run_itself_is_no_lost_worker_even_if_peers_then_disconnect(error: Exception) -> None:
    assert lost_workers(training_failure(rank0=error)) == []
    assert lost_workers(training_failure(rank0=RESET, rank1=error)) == []


def test_no_rank_is_stalled_while_one_sends_heartbeats() -> None:
    heartbeats = [Heartbeat(0, 7, COMPUTING, time=0.0), Heartbeat(1, 7, LOADING, time=95.0)]
    assert find_stalled_rank(heartbeats, now=100.0, timeout_s=60.0) is None
    assert find_stalled_rank([], now=100.0, timeout_s=60.0) is None


def test_rank_that_is_furthest_behind_is_the_stalled_one() -> None:
    heartbeats = [
        Heartbeat(0, 8, COMPUTING, time=10.0),
        Heartbeat(1, 8, LOADING, time=10.0),
        Heartbeat(2, 8, COMPUTING, time=9.0),
    ]
    stalled = find_stalled_rank(heartbeats, now=100.0, timeout_s=60.0)
    assert stalled == "rank 1 has been waiting for data in step 8 for 90 s"
    heartbeats[2] = Heartbeat(2, 7, COMPUTING, time=30.0)
    stalled = find_stalled_rank(heartbeats, now=100.0, timeout_s=60.0)
    assert stalled == "rank 2 has been computing in step 7 for 70 s"
