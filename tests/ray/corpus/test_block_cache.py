"""The block cache downloads each block once, verifies it, stays within its limit and retries storage failures."""

import json
import threading
from collections import Counter
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from raylava.cli import main
from raylava.config.recipe import Source
from raylava.corpus.block_cache import BlockCache, open_blocks
from raylava.corpus.blocks import Blocks
from raylava.corpus.shards import PrepareSpec
from raylava.corpus.shuffle import ShuffleWindows
from raylava.errors import RunError
from raylava.storage import StoragePath, storage_path
from raylava.train.batch_plan import BatchPlan
from tests.support.corpora import prepare_serially, with_settings
from tests.support.flaky_proxy import FlakyProxy

BLOCK_COUNT = 40


@pytest.fixture(scope="module")
def local(prepare_spec: PrepareSpec, tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    """A local corpus of BLOCK_COUNT blocks with four samples each."""
    sources = (Source(annotations="a", sampling_weight=BLOCK_COUNT * 4 / 40),)
    output = tmp_path_factory.mktemp("blocks")
    prepare_serially(with_settings(prepare_spec, output, samples_per_block=4, sources=sources))
    return Blocks(output)


@pytest.fixture
def remote(local: Blocks, proxy: FlakyProxy, s3: str, request: pytest.FixtureRequest) -> StoragePath:
    copy = storage_path(f"{s3}/{request.node.name}")
    pafs.copy_files(str(local.folder), copy.path, destination_filesystem=copy.filesystem)
    proxy.gets.clear()
    return copy


def cached_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.arrow"))


def make_plan(blocks: Blocks, window_bytes: float) -> BatchPlan:
    records = blocks.manifest.blocks
    rows, sizes = tuple(record.rows for record in records), tuple(record.bytes for record in records)
    return BatchPlan(len(blocks), 8, epochs=1, seed=0, windows=ShuffleWindows(rows, sizes, window_bytes))


def test_epoch_in_shuffle_windows_downloads_each_block_once_within_the_cache_limit(
    local: Blocks, remote: StoragePath, proxy: FlakyProxy
) -> None:
    total = sum(record.bytes for record in local.manifest.blocks)
    limit = total / 10
    blocks = open_blocks(remote, limit)
    for step in make_plan(local, window_bytes=limit / 3).from_step(0):
        blocks.fetch(step.samples)
        assert [blocks[number] for number in step.samples] == [local[number] for number in step.samples]
        assert cached_bytes(blocks.folder) <= limit
    downloads = Counter(path for path in proxy.gets if path.endswith(".arrow") and "block-" in path)
    assert len(downloads) == BLOCK_COUNT
    assert set(downloads.values()) == {1}


def test_two_readers_on_one_node_download_a_block_once(local: Blocks, remote: StoragePath, proxy: FlakyProxy) -> None:
    proxy.mode = "slow"
    readers = [threading.Thread(target=open_blocks(remote, 1e9).fetch, args=(range(40),)) for _ in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    downloads = Counter(path for path in proxy.gets if "block-" in path)
    assert set(downloads.values()) == {1}


@pytest.mark.parametrize("mode", ["refusing", "hanging"])
def test_temporary_storage_failure_is_retried(
    mode: str, local: Blocks, remote: StoragePath, proxy: FlakyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = open_blocks(remote, 1e9)
    proxy.mode = mode
    reader = threading.Thread(target=blocks.fetch, args=([0],))
    reader.start()
    while "retrying" not in caplog.text:
        assert reader.is_alive()
    proxy.mode = "well"
    reader.join(timeout=60)
    assert not reader.is_alive()
    assert blocks[0] == local[0]


def test_permanent_storage_failure_raises_os_error(local: Blocks, remote: StoragePath, proxy: FlakyProxy) -> None:
    cache = BlockCache(remote, 1e9, retry_timeout_s=0)
    proxy.mode = "refusing"
    with pytest.raises(OSError, match=r"503|SERVICE_UNAVAILABLE|unavailable"):
        cache.file(local.manifest.blocks[0])


def test_block_corrupt_in_storage_is_reported_by_path(local: Blocks, remote: StoragePath) -> None:
    record = local.manifest.blocks[3]
    (remote / record.path).write_bytes(b"other")
    with pytest.raises(RunError, match=r"block-00003.arrow: corrupt block"):
        open_blocks(remote, 1e9).fetch([12])


def test_cached_block_that_was_damaged_on_disk_is_downloaded_again(
    local: Blocks, remote: StoragePath, proxy: FlakyProxy
) -> None:
    record = local.manifest.blocks[0]
    file = BlockCache(remote, 1e9).file(record)
    file.write_bytes(b"damaged")
    assert BlockCache(remote, 1e9).file(record).read_bytes() == (local.folder / record.path).read_bytes()
    assert sum("block-00000" in path for path in proxy.gets) == 2
    BlockCache(remote, 1e9).file(record)
    assert sum("block-00000" in path for path in proxy.gets) == 2


def test_inspect_reads_a_corpus_in_a_bucket_through_the_bounded_cache(
    remote: StoragePath, local: Blocks, proxy: FlakyProxy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = {"stage": "prepare", "fingerprint": "x", "fingerprint_fields": {}, "inputs": {}, "metrics": {}}
    record |= {"seconds": 1.0, "finished": "2026-01-01T00:00:00Z"}
    (remote / "artifact.json").write_bytes(json.dumps(record).encode())
    proxy.gets.clear()
    assert main(["inspect", remote.uri, "--samples", "1", "--html", str(tmp_path / "page.html"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["histogram"]
    assert sum("block-" in path for path in proxy.gets) == 1, "only the block of the sample that is shown"
