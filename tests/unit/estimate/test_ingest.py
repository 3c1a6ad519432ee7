"""Ingest plans respect the request limits of the storage and name their bottleneck."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylava.estimate.ingest import IngestSpec, StorageLimits, plan_ingest

IMAGE_COUNTS = st.sampled_from([558_128, 10_000_000, 1_000_000_000])


@given(IMAGE_COUNTS, st.integers(1, 128), st.sampled_from([1, 100, 1000]), st.integers(1, 16), st.integers(1, 64))
def test_requests_stay_within_the_storage_limits(
    images: int, cores: int, images_per_shard: int, prefixes: int, requests_in_flight: int
) -> None:
    limits = StorageLimits(requests_in_flight=requests_in_flight)
    spec = IngestSpec(images, cores, images_per_shard=images_per_shard, prefixes=prefixes, storage=limits)
    plan = plan_ingest(spec)
    assert plan.images_per_second / images_per_shard <= limits.gets_per_second * prefixes * (1 + 1e-9)
    assert plan.images_per_second * 3 / 2048 <= limits.puts_per_second * (1 + 1e-9)
    assert plan.nodes <= plan.max_nodes
    assert plan.hours * plan.images_per_second * 3600 == pytest.approx(images)


@given(IMAGE_COUNTS, st.integers(1, 8))
def test_more_nodes_are_never_slower_and_never_exceed_the_request_limit(images: int, nodes: int) -> None:
    spec = IngestSpec(images)
    fewer, more = plan_ingest(spec, nodes), plan_ingest(spec, 2 * nodes)
    assert more.hours <= fewer.hours
    assert more.images_per_second <= spec.storage.gets_per_second


def test_the_alignment_corpus_takes_minutes_and_a_billion_single_files_take_days() -> None:
    small, large = plan_ingest(IngestSpec(558_128)), plan_ingest(IngestSpec(1_000_000_000))
    assert small.nodes == 1
    assert small.hours < 0.1
    assert large.bottleneck == "latency"
    assert large.hours > 24


def test_packed_sources_are_limited_by_the_nodes_not_by_requests() -> None:
    plan = plan_ingest(IngestSpec(1_000_000_000, images_per_shard=1000, prefixes=16))
    assert plan.bottleneck in ("network", "cores", "latency")
    assert plan.hours <= 24
    assert plan.requests_per_second < 100


def test_a_local_folder_is_limited_by_the_cores() -> None:
    plan = plan_ingest(IngestSpec(10_000_000, cores=2, storage=StorageLimits.local_disk()), nodes=1)
    assert plan.bottleneck == "cores"
    assert plan.images_per_second == 200
