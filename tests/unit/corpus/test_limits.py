"""Rows that are too large, and images that are no files, cost no time: they are quarantined before any work on them."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from raylava.corpus import conversation
from raylava.corpus.blocks import decode_quarantine
from raylava.corpus.formats import FORMATS
from raylava.corpus.quarantine import BadRow, Reason
from raylava.corpus.row_images import ImageReader
from raylava.corpus.shards import PrepareSpec
from raylava.corpus.source_cache import SourceCache
from raylava.storage import StoragePath, storage_path
from tests.support.corpora import prepare_serially, with_settings


def quarantined(spec: PrepareSpec, corpus: Path, output: Path, **settings: Any) -> list[tuple[str, str]]:
    prepare_serially(with_settings(spec, output, corpus, quarantine_limit=1.0, **settings))
    rows = decode_quarantine((output / "quarantine.csv").read_bytes())
    return [(row.reason, row.detail) for row in rows]


def change_first_row(corpus: Path, **changes: Any) -> Path:
    """Change the first row of the alignment corpus; return its image."""
    rows = json.loads((corpus / "alignment.json").read_text())
    rows[0].update(changes)
    (corpus / "alignment.json").write_text(json.dumps(rows))
    return corpus / "images" / str(rows[0]["image"])


def test_text_of_16_mb_is_quarantined_before_it_is_tokenized(
    prepare_spec: PrepareSpec, corpus_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [{"from": "human", "value": "<image>\nRead."}, {"from": "gpt", "value": "word " * (16 << 20 >> 2)}]
    change_first_row(corpus_copy, conversations=long)
    tokenized: list[int] = []
    encode = conversation.ChatTokenizer.encode

    def record(self: Any, turns: Any, image_count: int) -> Any:
        tokenized.append(sum(len(turn.text) for turn in turns))
        return encode(self, turns, image_count)

    monkeypatch.setattr(conversation.ChatTokenizer, "encode", record)
    (row,) = quarantined(prepare_spec, corpus_copy, tmp_path / "out")
    assert row == ("too long", "20971533 characters, more than max_chars=1000000")
    assert max(tokenized) < 1_000_000


def test_large_image_file_is_not_read(
    prepare_spec: PrepareSpec, corpus_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with change_first_row(corpus_copy).open("wb") as file:
        file.truncate(70_000_000)  # a sparse file
    (row,) = quarantined(prepare_spec, corpus_copy, tmp_path / "out")
    assert row[0] == "image too large"
    assert row[1].endswith(": 70000000 bytes, more than max_image_bytes=64000000")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_image_that_is_no_regular_file_is_quarantined_without_waiting(
    kind: str, prepare_spec: PrepareSpec, corpus_copy: Path, tmp_path: Path
) -> None:
    image = change_first_row(corpus_copy)
    image.unlink()
    if kind == "pipe":
        os.mkfifo(image)
        (row,) = quarantined(prepare_spec, corpus_copy, tmp_path / "out")
        assert row[0] == "image unreadable"
        assert row[1].endswith("is not a regular file")
    else:  # a link out of the folder, which is the only way to name a device
        image.symlink_to("/dev/zero")
        (row,) = quarantined(prepare_spec, corpus_copy, tmp_path / "out")
        assert row[0] == "image path escapes the root"


def test_large_member_of_a_tar_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(tmp_path / "rows.tar", "w") as tar:
        for name, size in (("a.jpg", 10), ("a.txt", 3), ("b.jpg", 5000), ("b.txt", 3)):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(b"x" * size))
    file = storage_path(tmp_path / "rows.tar")
    offsets = [row.offset for row in FORMATS["webdataset"].scan(file)]
    read: list[int] = []
    open_random = StoragePath.open_random

    class Recording(io.RawIOBase):
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
            return int(self._stream.seek(offset, whence))

        def read(self, size: int | None = -1) -> bytes:
            read.append(size or 0)
            return bytes(self._stream.read(size))

    monkeypatch.setattr(StoragePath, "open_random", lambda self: Recording(open_random(self)))
    small, large = FORMATS["webdataset"].read_rows(file, offsets, 1000)
    assert small["id"] == "a"
    assert isinstance(large, BadRow)
    assert (large.reason, large.detail) == (Reason.IMAGE_TOO_LARGE, "b: 5000 bytes, more than max_image_bytes=1000")
    assert max(read) == 10


def test_image_within_the_row_is_limited_as_well(tmp_path: Path) -> None:
    with pytest.raises(BadRow, match="image too large"):
        ImageReader(storage_path(tmp_path), max_bytes=3)(b"1234")


def test_conversation_is_tokenized_once_however_many_exchanges_are_dropped(
    prepare_spec: PrepareSpec, corpus_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = [{"from": "human", "value": "Go on."}, {"from": "gpt", "value": "yes"}] * 200
    rows = json.loads((corpus_copy / "alignment.json").read_text())[:1]
    rows[0] |= {"conversations": talk}
    del rows[0]["image"]
    (corpus_copy / "alignment.json").write_text(json.dumps(rows))
    calls: list[int] = []
    encode = conversation.ChatTokenizer.encode

    def record(self: Any, turns: Any, image_count: int) -> Any:
        calls.append(len(turns))
        return encode(self, turns, image_count)

    monkeypatch.setattr(conversation.ChatTokenizer, "encode", record)
    settings = {"on_overlong": "truncate_exchanges", "max_length": 128}
    manifest = prepare_serially(with_settings(prepare_spec, tmp_path / "out", corpus_copy, **settings))
    assert (manifest.rows, manifest.truncated) == (1, 1)
    assert 100 < manifest.tokens <= 128
    assert calls == [400]


@pytest.mark.parametrize("target", ["loop.jpg", "other.jpg"])
def test_links_that_loop_are_quarantined(
    target: str, prepare_spec: PrepareSpec, corpus_copy: Path, tmp_path: Path
) -> None:
    image = change_first_row(corpus_copy, image="loop.jpg")
    (corpus_copy / "images" / "loop.jpg").symlink_to(target)
    (corpus_copy / "images" / "other.jpg").symlink_to("loop.jpg")
    (row,) = quarantined(prepare_spec, corpus_copy, tmp_path / "out")
    assert row[0] == "image unreadable", image


def test_file_name_that_is_not_utf8_and_named_by_no_row_has_no_effect(
    prepare_spec: PrepareSpec, corpus_copy: Path, tmp_path: Path
) -> None:
    def fingerprint() -> Any:
        (source,) = with_settings(prepare_spec, tmp_path, corpus_copy).sources
        return SourceCache().fingerprint_fields(source, storage_path(tmp_path / "indexes"))

    before = fingerprint()
    with open(os.fsencode(corpus_copy / "images") + b"/\xff.jpg", "wb"):
        pass
    assert fingerprint() == before
    assert quarantined(prepare_spec, corpus_copy, tmp_path / "out") == []
