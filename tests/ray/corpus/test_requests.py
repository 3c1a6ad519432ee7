"""The number of requests to a bucket depends on files and bytes, not on rows: counted at a proxy before S3 (moto)."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylava.config.recipe import Source
from raylava.corpus.block_writer import make_block
from raylava.corpus.prepare import prepare
from raylava.corpus.shards import PrepareSpec, stage_rows
from raylava.corpus.source_cache import SourceCache
from raylava.corpus.sources import SourceFiles
from raylava.progress import NullProgressBar
from raylava.storage import storage_path
from tests.support.corpora import prepare_serially, read_rows, with_settings
from tests.support.flaky_proxy import FlakyProxy

SAMPLES = 200


@pytest.fixture
def rows(prepare_spec: PrepareSpec) -> list[tuple[dict[str, object], bytes]]:
    """Rows and their images' bytes."""
    annotations, images = read_rows(prepare_spec)
    pairs = [(row, (images / row["image"]).read_bytes()) for row in annotations]
    return (pairs * (SAMPLES // len(pairs) + 1))[:SAMPLES]


def write_tar(rows: list[tuple[dict[str, object], bytes]], uri: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, (row, image) in enumerate(rows):
            conversation = json.dumps({"conversations": row["conversations"]}).encode()
            for suffix, content in (("png", image), ("json", conversation)):
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    storage_path(uri).write_bytes(buffer.getvalue())


def test_tar_of_200_samples_is_prepared_with_30_gets(
    prepare_spec: PrepareSpec, rows: list[tuple[dict[str, object], bytes]], proxy: FlakyProxy, s3: str, tmp_path: Path
) -> None:
    uri = f"{s3}/requests/rows.tar"
    write_tar(rows, uri)
    source = Source(annotations="rows.tar")
    corpus = prepare_spec.corpus.model_copy(update={"sources": (source,), "samples_per_block": 2048})
    spec = dataclasses.replace(prepare_spec, corpus=corpus, source_paths=((uri, ""),), output=f"{s3}/requests/out")
    proxy.gets.clear()
    SourceCache().fingerprint_fields(SourceFiles(source, uri, ""), storage_path(tmp_path))
    assert len(proxy.gets) <= 5, proxy.gets
    manifest = prepare_serially(spec)
    assert manifest.rows == SAMPLES
    assert len(proxy.gets) <= 30, proxy.gets


@pytest.mark.usefixtures("ray_cluster")
def test_resuming_and_publishing_list_the_shards_once(prepare_spec: PrepareSpec, proxy: FlakyProxy, s3: str) -> None:
    """Each of 20 shards has a record, lengths and quarantined rows; pyarrow reads a file by a HEAD and a GET."""
    spec = dataclasses.replace(
        with_settings(prepare_spec, Path("unused"), samples_per_block=2), output=f"{s3}/requests/resumed"
    )
    output = storage_path(spec.output)
    rows, shards = stage_rows(spec, output)
    for shard in range(shards):
        make_block(spec, shard)
    proxy.gets.clear()
    proxy.heads.clear()
    manifest = prepare(spec, "tokenizer", NullProgressBar())
    assert manifest.rows == rows == 2 * shards == 40
    listings = [path for path in proxy.gets if path.count("/") == 1]
    assert len(listings) <= 5, listings
    assert len(proxy.gets) <= 4 * shards + 10
    assert len(proxy.heads) <= 4 * shards + 30


def test_parquet_is_fingerprinted_with_5_gets(proxy: FlakyProxy, s3: str, tmp_path: Path) -> None:
    table = pa.table({"conversations": [[{"from": "human", "value": "Hi" * 500}] for _ in range(20_000)]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=500)
    uri = f"{s3}/requests/rows.parquet"
    storage_path(uri).write_bytes(buffer.getvalue())
    proxy.gets.clear()
    source = SourceFiles(Source(annotations="rows.parquet"), uri, "")
    SourceCache().fingerprint_fields(source, storage_path(tmp_path))
    assert len(proxy.gets) <= 5, proxy.gets


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_json_is_hashed_and_scanned_with_one_get_per_8_mb(
    name: str, proxy: FlakyProxy, s3: str, tmp_path: Path
) -> None:
    row = {"id": 0, "conversations": [{"from": "human", "value": "Hi" * 2000}, {"from": "gpt", "value": "Hello"}]}
    rows = [json.dumps(row)] * 5000  # 20 MB
    uri = f"{s3}/requests/{name}"
    storage_path(uri).write_bytes((f"[{','.join(rows)}]" if name == "rows.json" else "\n".join(rows)).encode())
    source = SourceFiles(Source(annotations=name), uri, f"{s3}/requests")
    proxy.gets.clear()
    sources = SourceCache()
    sources.fingerprint_fields(source, storage_path(tmp_path))
    assert len(proxy.gets) <= 5, proxy.gets  # 3 to hash and index, the end of file
    read = len(proxy.gets)
    assert sum(1 for _ in source.selected_rows(0, sources.indexes(storage_path(tmp_path)))) == 5000
    assert len(proxy.gets) == read, "the index is not built again"
