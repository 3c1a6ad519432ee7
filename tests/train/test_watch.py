"""The rank that holds the others up is named, and nobody while somebody still moves."""

from raylava.train.watch import COMPUTING, LOADING, Beat, silent


def test_nobody_is_silent_while_one_rank_moves() -> None:
    assert silent([Beat(0, 7, COMPUTING, at=0.0), Beat(1, 7, LOADING, at=95.0)], now=100.0, patience=60.0) is None
    assert silent([], now=100.0, patience=60.0) is None


def test_the_rank_that_is_furthest_behind_is_the_cause() -> None:
    beats = [Beat(0, 8, COMPUTING, at=10.0), Beat(1, 8, LOADING, at=10.0), Beat(2, 8, COMPUTING, at=9.0)]
    assert silent(beats, now=100.0, patience=60.0) == "rank 1 has been waiting for data in step 8 for 90 s"
    beats[2] = Beat(2, 7, COMPUTING, at=30.0)
    assert silent(beats, now=100.0, patience=60.0) == "rank 2 has been computing in step 7 for 70 s"
