"""The monitor names the stalled rank; a vanished peer is distinguished from an error of the rank itself."""

import pytest
from torch.distributed import DistBackendError, DistNetworkError

from raylava.errors import RunError
from raylava.train.backend import COMPUTING, LOADING, PUBLISHING, STARTING
from raylava.train.ray.failures import is_device_failure, is_peer_failure
from raylava.train.ray.monitor import Heartbeat, find_stalled_rank

PEER_FAILURES = {
    "reset": RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:45456: Connection reset by peer."),
    "closed": RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.4]:2211"),
    "nccl": DistBackendError(
        "NCCL error: ncclRemoteError: A call failed possibly due to a remote process exiting prematurely"
    ),
    "link": DistBackendError(
        "NCCL error: ncclSystemError: System call (e.g. socket, malloc) or external library failed"
    ),
    "watchdog": DistBackendError("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)"),
    "store": DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did the server shutdown?"),
}
OWN_ERRORS = [
    RunError("5 consecutive steps had a non-finite loss"),
    RuntimeError("shapes cannot be multiplied"),
    OSError("storage: connection reset by peer"),
    RuntimeError("storage: connection reset by peer"),
    DistBackendError("NCCL error: invalid usage"),
]


@pytest.mark.parametrize("name", PEER_FAILURES)
def test_collective_that_lost_its_peer_is_a_peer_failure(name: str) -> None:
    assert is_peer_failure(PEER_FAILURES[name])


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: unspecified launch failure",
        "NVML: GPU has fallen off the bus",
        "CUDA-capable device(s) is/are busy or unavailable",
    ],
)
def test_broken_gpu_is_told_apart_from_an_error_of_the_program(message: str) -> None:
    assert is_device_failure(RuntimeError(message))
    assert not is_device_failure(RunError(message))


@pytest.mark.parametrize("error", [*OWN_ERRORS, RuntimeError("CUDA error: an illegal memory access was encountered")])
def test_error_of_the_program_is_not_taken_for_a_broken_gpu(error: Exception) -> None:
    assert not is_device_failure(error)


@pytest.mark.parametrize("error", OWN_ERRORS, ids=str)
def test_any_other_error_is_the_ranks_own(error: Exception) -> None:
    assert not is_peer_failure(error)


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


def test_rank_that_loads_the_model_is_the_stalled_one_before_the_first_step() -> None:
    heartbeats = [Heartbeat(0, 0, LOADING, time=0.0), Heartbeat(1, 0, STARTING, time=5.0)]
    assert find_stalled_rank(heartbeats, now=300.0, timeout_s=60.0) is None, "models take long to load"
    stalled = find_stalled_rank(heartbeats, now=306.0, timeout_s=60.0)
    assert stalled == "rank 1 has been loading the model in step 0 for 301 s"


def test_no_rank_is_stalled_while_the_result_is_written() -> None:
    heartbeats = [Heartbeat(rank, 72, PUBLISHING, time=0.0) for rank in range(2)]
    assert find_stalled_rank(heartbeats, now=900.0, timeout_s=60.0) is None
    heartbeats[1] = Heartbeat(1, 71, COMPUTING, time=0.0)
    assert find_stalled_rank(heartbeats, now=900.0, timeout_s=60.0) == "rank 1 has been computing in step 71 for 900 s"
