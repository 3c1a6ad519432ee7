"""A source's content is identified independent of its location, and each version of a file is scanned once."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from raylava.config.recipe import Source
from raylava.corpus import row_index
from raylava.corpus.source_cache import SourceCache
from raylava.corpus.sources import SourceFiles
from raylava.errors import UserError
from raylava.storage import storage_path

CONVERSATION = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
OLD = 1_700_000_000


def make_source(folder: Path, images: list[str], **settings: Any) -> SourceFiles:
    """Write rows with these images; the file's modification time is long ago."""
    folder.mkdir(exist_ok=True)
    file = folder / "rows.json"
    file.write_text(json.dumps([{"image": image, "conversations": CONVERSATION} for image in images]))
    os.utime(file, (OLD, OLD))
    return SourceFiles(Source(annotations="rows.json", **settings), str(file), str(folder))


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were scanned."""
    scanned: list[str] = []
    scan = row_index._scan
    monkeypatch.setattr(
        row_index, "_scan", lambda part, span: scanned.append(Path(part.file.uri).name) or scan(part, span)
    )
    return scanned


def fields(source: SourceFiles, folder: Path) -> dict[str, Any]:
    """Return the fingerprint fields as a new process computes them."""
    return SourceCache().fingerprint_fields(source, storage_path(folder))


def test_fingerprint_depends_on_content_not_location(tmp_path: Path) -> None:
    fingerprints = []
    for name, image in (("one", b"123"), ("two", b"123"), ("three", b"1234")):
        source = make_source(tmp_path / name, ["a.png"])
        (tmp_path / name / "a.png").write_bytes(image)
        (tmp_path / name / "not named by any row.png").write_bytes(name.encode())
        fingerprints.append(fields(source, tmp_path / "scanned"))
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_missing_image_folder_raises_user_error(tmp_path: Path) -> None:
    source = make_source(tmp_path, ["a.png"])
    with pytest.raises(UserError, match="no such image folder"):
        fields(SourceFiles(source.source, source.annotations, str(tmp_path / "none")), tmp_path / "scanned")


def test_unchanged_file_is_scanned_once(tmp_path: Path, scans: list[str]) -> None:
    source = make_source(tmp_path / "corpus", ["a.png"])
    first = fields(source, tmp_path / "scanned")
    assert fields(source, tmp_path / "scanned") == first
    assert scans == ["rows.json"]
    (tmp_path / "corpus" / "a.png").write_bytes(b"an image that was added")
    assert fields(source, tmp_path / "scanned")["images"] != first["images"], "image folders are always listed"
    assert scans == ["rows.json"]


def test_file_that_changed_is_scanned_again(tmp_path: Path, scans: list[str]) -> None:
    first = fields(make_source(tmp_path / "corpus", ["a.png"]), tmp_path / "scanned")
    source = make_source(tmp_path / "corpus", ["b.png"])  # of the same size
    os.utime(source.annotations, (OLD, OLD + 1))
    assert fields(source, tmp_path / "scanned") != first
    assert len(scans) == 2


def test_file_that_was_just_modified_is_scanned_every_time(tmp_path: Path, scans: list[str]) -> None:
    source = make_source(tmp_path / "corpus", ["a.png"])
    os.utime(source.annotations)
    fields(source, tmp_path / "scanned")
    fields(source, tmp_path / "scanned")
    assert len(scans) == 2


def test_sources_of_one_file_with_other_filters_share_its_index(tmp_path: Path, scans: list[str]) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "b.png").write_bytes(b"an image")
    everything = fields(make_source(tmp_path / "corpus", ["a.png", "b.png"]), tmp_path / "scanned")
    filtered = fields(make_source(tmp_path / "corpus", ["a.png", "b.png"], exclude=("b*",)), tmp_path / "scanned")
    assert len(scans) == 2, "make_source writes the file again"
    source = make_source(tmp_path / "corpus", ["a.png", "b.png"], exclude=("b*",))
    fields(source, tmp_path / "scanned")
    fields(
        SourceFiles(source.source.model_copy(update={"exclude": ()}), source.annotations, source.images),
        tmp_path / "scanned",
    )
    assert len(scans) == 3
    assert everything["images"] != filtered["images"]


def test_shards_are_staged_from_the_index_of_an_earlier_command(tmp_path: Path, scans: list[str]) -> None:
    source = make_source(tmp_path / "corpus", ["a.png", "b.png", "c.png"])
    fields(source, tmp_path / "scanned")
    rows = list(source.selected_rows(0, SourceCache().indexes(storage_path(tmp_path / "scanned"))))
    assert [row.row for row in rows] == [0, 1, 2]
    assert scans == ["rows.json"]


def test_tars_and_parquet_are_not_scanned_to_be_identified(tmp_path: Path, scans: list[str]) -> None:
    (tmp_path / "rows.tar").write_bytes(b"not even a tar".ljust(512))
    os.utime(tmp_path / "rows.tar", (OLD, OLD))
    source = SourceFiles(Source(annotations="rows.tar"), str(tmp_path / "rows.tar"), "")
    assert fields(source, tmp_path / "scanned")["annotations"][0]["bytes"] == 512
    assert scans == []


def test_results_of_another_process_are_used_without_reading_anything(tmp_path: Path, scans: list[str]) -> None:
    source = make_source(tmp_path / "corpus", ["a.png"])
    driver = SourceCache()
    expected = driver.fingerprint_fields(source, storage_path(tmp_path / "scanned"))
    Path(source.annotations).unlink()
    trial = SourceCache(json.loads(json.dumps(driver.known)))
    assert trial.fingerprint_fields(source, storage_path(tmp_path / "scanned")) == expected
    assert scans == ["rows.json"]


def test_storage_that_cannot_be_written_is_no_error(tmp_path: Path, scans: list[str]) -> None:
    source = make_source(tmp_path / "corpus", ["a.png"])
    (tmp_path / "file").write_text("no folder can be made here")
    assert fields(source, tmp_path / "file") == fields(source, tmp_path / "scanned")
    assert len(scans) == 2
