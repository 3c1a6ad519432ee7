"""A plan for preparing keeps within what the object store admits, and says what holds it back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylava.estimate.ingest import Ingest, Store, plan

COUNTS = st.sampled_from([558_128, 10_000_000, 1_000_000_000])


@given(COUNTS, st.integers(1, 128), st.sampled_from([1, 100, 1000]), st.integers(1, 16), st.integers(1, 64))
def test_requests_stay_within_the_stores_limits(
    images: int, cores: int, shard: int, prefixes: int, in_flight: int
) -> None:
    store = Store(in_flight=in_flight)
    found = plan(Ingest(images, cores, shard=shard, prefixes=prefixes, store=store))
    assert found.rate / shard <= store.gets * prefixes * (1 + 1e-9)
    assert found.rate * 3 / 2048 <= store.puts * (1 + 1e-9)
    assert found.nodes <= found.nodes_at_most
    assert found.hours * found.rate * 3600 == pytest.approx(images)


@given(COUNTS, st.integers(1, 8))
def test_more_nodes_are_never_slower_and_never_faster_than_the_store(images: int, nodes: int) -> None:
    ingest = Ingest(images)
    fewer, more = plan(ingest, nodes), plan(ingest, 2 * nodes)
    assert more.hours <= fewer.hours
    assert more.rate <= ingest.store.gets


def test_llavas_alignment_corpus_takes_minutes_on_a_node_and_a_billion_single_files_days() -> None:
    small, large = plan(Ingest(558_128)), plan(Ingest(1_000_000_000))
    assert small.nodes == 1
    assert small.hours < 0.1
    assert large.bound == "latency"
    assert large.hours > 24


def test_images_in_tars_are_held_by_the_nodes_and_not_by_requests() -> None:
    found = plan(Ingest(1_000_000_000, shard=1000, prefixes=16))
    assert found.bound in ("network", "cores", "latency")
    assert found.hours <= 24
    assert found.requests_per_second < 100


def test_a_folder_has_no_requests_to_keep_within() -> None:
    found = plan(Ingest(10_000_000, cores=2, store=Store.disk()), nodes=1)
    assert found.bound == "cores"
    assert found.rate == 200
