"""Blocks in a bucket come to a bounded folder on the node: once each while held, verified, through failures."""

import dataclasses
import threading
from collections import Counter
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from raylava.config.recipe import Source
from raylava.console import NullProgressBar
from raylava.corpus import block_cache as cache_module
from raylava.corpus.block_cache import BlockCache, cached_blocks
from raylava.corpus.blocks import Blocks
from raylava.corpus.prepare import PrepareSpec, prepare
from raylava.errors import RunError
from raylava.storage import StoragePath, storage_path
from raylava.train.batch_plan import BatchPlan, ShuffleWindows
from tests.flaky import FlakyProxy

BLOCKS = 40


@pytest.fixture(scope="module")
def local(prepare_job: PrepareSpec, tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    """Blocks of four rows each."""
    sources = (Source(annotations="a", sampling_weight=BLOCKS * 4 / 40),)
    corpus = prepare_job.corpus.model_copy(update={"samples_per_block": 4, "sources": sources})
    output = tmp_path_factory.mktemp("blocks")
    prepare(dataclasses.replace(prepare_job, corpus=corpus, output=str(output)), "tokenizer", NullProgressBar())
    return Blocks(output)


@pytest.fixture
def remote(local: Blocks, proxy: FlakyProxy, s3: str, request: pytest.FixtureRequest) -> StoragePath:
    there = storage_path(f"{s3}/{request.node.name}")
    pafs.copy_files(str(local.folder), there.path, destination_filesystem=there.filesystem)
    proxy.gets.clear()
    return there


def held(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.arrow"))


def plan_of(blocks: Blocks, window_bytes: float) -> BatchPlan:
    records = blocks.manifest.blocks
    shelves = ShuffleWindows(tuple(r.rows for r in records), tuple(r.bytes for r in records), window_bytes)
    return BatchPlan(len(blocks), 8, epochs=1, seed=0, shelves=shelves)


def test_an_epoch_in_windows_fetches_each_block_once_and_never_holds_more_than_the_cache(
    local: Blocks, remote: StoragePath, proxy: FlakyProxy
) -> None:
    whole = sum(record.bytes for record in local.manifest.blocks)
    bound = whole / 10
    blocks = cached_blocks(remote, bound)
    for step in plan_of(local, window_bytes=bound / 3).from_step(0):
        blocks.fetch(step.samples)
        assert [blocks[number] for number in step.samples] == [local[number] for number in step.samples]
        assert held(blocks.folder) <= bound
    fetched = Counter(path for path in proxy.gets if path.endswith(".arrow") and "block-" in path)
    assert len(fetched) == BLOCKS
    assert set(fetched.values()) == {1}


def test_two_readers_of_one_node_fetch_a_block_once(local: Blocks, remote: StoragePath, proxy: FlakyProxy) -> None:
    proxy.mode = "slow"
    readers = [threading.Thread(target=cached_blocks(remote, 1e9).fetch, args=(range(40),)) for _ in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    fetched = Counter(path for path in proxy.gets if "block-" in path)
    assert set(fetched.values()) == {1}


@pytest.mark.parametrize("mode", ["refusing", "hanging"])
def test_storage_that_fails_for_a_while_is_waited_for(
    mode: str, local: Blocks, remote: StoragePath, proxy: FlakyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = cached_blocks(remote, 1e9)
    proxy.mode = mode
    reader = threading.Thread(target=blocks.fetch, args=([0],))
    reader.start()
    while "trying again" not in caplog.text:
        assert reader.is_alive()
    proxy.mode = "well"
    reader.join(timeout=60)
    assert not reader.is_alive()
    assert blocks[0] == local[0]


def test_storage_that_fails_for_good_is_told(local: Blocks, remote: StoragePath, proxy: FlakyProxy) -> None:
    cache = BlockCache(remote, 1e9, retry_seconds=0)
    proxy.mode = "refusing"
    with pytest.raises(OSError, match=r"503|SERVICE_UNAVAILABLE|unavailable"):
        cache.file(local.manifest.blocks[0])


def test_a_block_damaged_at_its_source_names_itself(local: Blocks, remote: StoragePath) -> None:
    record = local.manifest.blocks[3]
    (remote / record.path).write_bytes(b"other")
    with pytest.raises(RunError, match=r"block-00003.arrow: damaged"):
        cached_blocks(remote, 1e9).fetch([12])


def test_a_local_corpus_is_read_where_it_lies(local: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "BlockCache", None)
    assert cached_blocks(storage_path(local.folder), 1.0).folder == local.folder
