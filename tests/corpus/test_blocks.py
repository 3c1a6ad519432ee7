"""Blocks open in ordinary tools, are read by number without a scan, and name themselves when they are damaged."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raylava.console import NullProgressBar
from raylava.corpus.blocks import (
    LENGTHS,
    MANIFEST,
    Blocks,
    Sample,
    block_bytes,
    lengths_bytes,
    lengths_of,
    quarantine_bytes,
    read_lengths,
    read_quarantine,
)
from raylava.corpus.prepare import PrepareSpec, prepare
from raylava.corpus.quarantine import Quarantined
from raylava.errors import RunError

SAMPLES = [
    Sample("a#0", [2, 7, 9], [(1, 3)], [b"png"], 40),
    Sample("b#1", [2, 5], [(0, 1), (1, 2)], [], 2),
    Sample("c#2", [2], [], [b"x", b"y"], 73),
]


def test_the_same_samples_give_the_same_bytes_and_read_back_equal() -> None:
    content = block_bytes(SAMPLES)
    assert content == block_bytes(SAMPLES)
    rows = pa.ipc.open_stream(pa.BufferReader(content)).read_all().to_pylist()
    assert [row["sample_id"] for row in rows] == ["a#0", "b#1", "c#2"]
    assert rows[1]["loss_tokens"] == [{"start": 0, "stop": 1}, {"start": 1, "stop": 2}]
    assert rows[2]["images"] == [b"x", b"y"]


def test_lengths_read_back_equal() -> None:
    lengths = lengths_of(SAMPLES)
    again = read_lengths(lengths_bytes(lengths))
    assert asdict(again).keys() == {"length", "images", "loss_tokens"}
    assert np.array_equal(again.length, [40, 2, 73])
    assert np.array_equal(again.images, [1, 0, 2])
    assert np.array_equal(again.loss_tokens, [2, 2, 0])


def test_the_quarantine_reads_back_equal_whatever_is_in_it() -> None:
    rows = [
        Quarantined(3, 'a "quoted", id', "x.json", "image missing", "two\nlines; naïve"),
        Quarantined(4, "", "", "", ""),
    ]
    assert read_quarantine(quarantine_bytes(rows)) == rows


@pytest.fixture(scope="module")
def prepared(prepare_job: PrepareSpec) -> Path:
    prepare(prepare_job, "tokenizer", NullProgressBar())
    return Path(prepare_job.output)


def test_a_sample_is_read_by_its_number_across_blocks(prepared: Path) -> None:
    blocks = Blocks(prepared)
    assert len(blocks.manifest.blocks) == 3
    assert [blocks[number].sample_id.rpartition(".")[2] for number in (0, 15, 16, 39)] == ["0", "15", "16", "39"]
    assert blocks[16].length == blocks.lengths.length[16]
    with pytest.raises(IndexError):
        blocks[40]


def test_a_damaged_block_names_itself(prepared: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    block = copy / "blocks" / "block-00001.arrow"
    content = bytearray(block.read_bytes())
    content[len(content) // 2] ^= 1
    block.write_bytes(content)
    blocks = Blocks(copy)
    assert blocks[0].sample_id
    with pytest.raises(RunError, match=r"block-00001\.arrow: damaged"):
        blocks[16]


def test_the_manifest_accounts_for_every_row_and_byte(prepared: Path) -> None:
    manifest = Blocks(prepared).manifest
    assert manifest.rows_in == manifest.rows == sum(block.rows for block in manifest.blocks) == 40
    assert [block.bytes for block in manifest.blocks] == [
        (prepared / block.path).stat().st_size for block in manifest.blocks
    ]
    assert {path.name for path in prepared.iterdir()} == {"blocks", LENGTHS, MANIFEST, "quarantine.csv", "tokenizer"}
