"""The rank that holds the others up is named, and nobody while somebody still moves."""

from raylava.train.watch import COMPUTING, LOADING, Heartbeat, find_stalled_rank


def test_nobody_is_silent_while_one_rank_moves() -> None:
    assert (
        find_stalled_rank(
            [Heartbeat(0, 7, COMPUTING, at=0.0), Heartbeat(1, 7, LOADING, at=95.0)], now=100.0, patience=60.0
        )
        is None
    )
    assert find_stalled_rank([], now=100.0, patience=60.0) is None


def test_the_rank_that_is_furthest_behind_is_the_cause() -> None:
    heartbeats = [
        Heartbeat(0, 8, COMPUTING, at=10.0),
        Heartbeat(1, 8, LOADING, at=10.0),
        Heartbeat(2, 8, COMPUTING, at=9.0),
    ]
    assert (
        find_stalled_rank(heartbeats, now=100.0, patience=60.0) == "rank 1 has been waiting for data in step 8 for 90 s"
    )
    heartbeats[2] = Heartbeat(2, 7, COMPUTING, at=30.0)
    assert find_stalled_rank(heartbeats, now=100.0, patience=60.0) == "rank 2 has been computing in step 7 for 70 s"
