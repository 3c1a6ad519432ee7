"""Encoding of blocks, random access to samples, and detection of corrupt blocks."""

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raylava.corpus.blocks import (
    LENGTHS,
    MANIFEST,
    Blocks,
    Sample,
    decode_lengths,
    decode_quarantine,
    encode_block,
    encode_lengths,
    encode_quarantine,
    sample_lengths,
)
from raylava.corpus.quarantine import QuarantinedRow
from raylava.corpus.shards import PrepareSpec
from raylava.errors import RunError
from raylava.local_copies import HASHES_FILE
from tests.support.corpora import prepare_serially

SAMPLES = [
    Sample("a#0", [2, 7, 9], [(1, 3)], [b"png"], 40),
    Sample("b#1", [2, 5], [(0, 1), (1, 2)], [], 2),
    Sample("c#2", [2], [], [b"x", b"y"], 73),
]


def test_block_encoding_is_deterministic_and_readable_by_pyarrow() -> None:
    content = encode_block(SAMPLES)
    assert content == encode_block(SAMPLES)
    rows = pa.ipc.open_stream(pa.BufferReader(content)).read_all().to_pylist()
    assert [row["sample_id"] for row in rows] == ["a#0", "b#1", "c#2"]
    assert rows[1]["loss_spans"] == [{"start": 0, "stop": 1}, {"start": 1, "stop": 2}]
    assert rows[2]["images"] == [b"x", b"y"]


def test_lengths_round_trip() -> None:
    decoded = decode_lengths(encode_lengths(sample_lengths(SAMPLES)))
    assert asdict(decoded).keys() == {"length", "images", "loss_tokens"}
    assert np.array_equal(decoded.length, [40, 2, 73])
    assert np.array_equal(decoded.images, [1, 0, 2])
    assert np.array_equal(decoded.loss_tokens, [2, 2, 0])


def test_quarantine_csv_round_trips_quotes_and_empty_fields() -> None:
    rows = [
        QuarantinedRow(3, 'a "quoted", id', "x.json", "image missing", "naïve; '"),
        QuarantinedRow(4, "", "", "", ""),
    ]
    assert decode_quarantine(encode_quarantine(rows)) == rows


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("a\rb\nc\0d", "a\\x0db\\x0ac\\x00d"),
        ("x" * 200_000, "x" * 2000),
        ("\ud800", "\\ud800"),
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        ("-1+1", "'-1+1"),
        ("@a", "'@a"),
    ],
    ids=["control characters", "long", "lone surrogate", "formula", "minus", "at"],
)
def test_quarantine_csv_reads_back_and_is_no_formula(text: str, cell: str) -> None:
    (row,) = decode_quarantine(encode_quarantine([QuarantinedRow(1, text, "f", "r", text)]))
    assert (row.sample_id, row.detail) == (cell, cell)


@pytest.fixture(scope="module")
def prepared(prepare_spec: PrepareSpec) -> Path:
    prepare_serially(prepare_spec)
    return Path(prepare_spec.output)


def test_samples_are_indexed_across_blocks(prepared: Path) -> None:
    blocks = Blocks(prepared)
    assert len(blocks.manifest.blocks) == 3
    assert [blocks[number].sample_id.rpartition(".")[2] for number in (0, 15, 16, 39)] == ["0", "15", "16", "39"]
    assert blocks[16].length == blocks.lengths.length[16]
    with pytest.raises(IndexError):
        blocks[40]


def test_corrupt_block_is_reported_by_path(prepared: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    block = copy / "blocks" / "block-00001.arrow"
    content = bytearray(block.read_bytes())
    content[len(content) // 2] ^= 1
    block.write_bytes(content)
    blocks = Blocks(copy)
    assert blocks[0].sample_id
    with pytest.raises(RunError, match=r"block-00001\.arrow: corrupt block"):
        blocks[16]


def test_manifest_accounts_for_every_row_and_byte(prepared: Path) -> None:
    manifest = Blocks(prepared).manifest
    assert manifest.rows_in == manifest.rows == sum(block.rows for block in manifest.blocks) == 40
    assert [block.bytes for block in manifest.blocks] == [
        (prepared / block.path).stat().st_size for block in manifest.blocks
    ]
    assert {path.name for path in prepared.iterdir()} == {
        "blocks",
        LENGTHS,
        MANIFEST,
        "quarantine.csv",
        "tokenizer",
        HASHES_FILE,
    }
