"""`raylava inspect --source` finds what LLaVA-665k's downloads are known for, and repairs what a rename would."""

import csv
import io
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from raylava.corpus.quarantine import Reason
from raylava.corpus.row_index import RowIndexes
from raylava.corpus.shards import PrepareSpec
from raylava.corpus.source_check import MISNAMED, SourceCheck, check_sources, repair_images
from raylava.progress import NullProgressBar
from raylava.storage import storage_path
from tests.support.corpora import map_serially, prepare_serially, read_rows, with_settings


@pytest.fixture
def spec(prepare_spec: PrepareSpec, corpus_copy: Path, tmp_path: Path) -> PrepareSpec:
    """The alignment corpus with one row of each kind: rows 0 to 5."""
    spec = with_settings(prepare_spec, tmp_path / "out", corpus_copy, quarantine_limit=1.0)
    rows, images = read_rows(spec)
    (images / "ocr_vqa").mkdir()
    for number, name in enumerate(("absent", "html", "cut", "animated", "renamed")):
        rows[number]["image"] = f"ocr_vqa/{name}.jpg"
    rows[5] = ["no row"]
    (images / "ocr_vqa" / "html.jpg").write_bytes(b"<html>404</html>")
    Image.effect_noise((64, 64), 90).save(images / "ocr_vqa" / "cut.jpg", "JPEG")
    content = (images / "ocr_vqa" / "cut.jpg").read_bytes()
    (images / "ocr_vqa" / "cut.jpg").write_bytes(content[: len(content) // 2])
    Image.new("P", (8, 8)).save(images / "ocr_vqa" / "animated.jpg", "GIF")
    Image.new("P", (8, 8)).save(images / "ocr_vqa" / "Renamed.gif", "GIF")
    (corpus_copy / "alignment.json").write_text(json.dumps(rows))
    return spec


def check(spec: PrepareSpec, folder: Path) -> SourceCheck:
    return check_sources(spec, storage_path(folder), RowIndexes(), NullProgressBar(), map_serially)


def test_each_known_hole_is_found_with_its_row_and_reason(spec: PrepareSpec, tmp_path: Path) -> None:
    result = check(spec, tmp_path)
    assert (result.rows, result.images) == (40, 39)
    assert [(finding.row, finding.image, finding.reason) for finding in result.findings] == [
        (0, "ocr_vqa/absent.jpg", Reason.IMAGE_MISSING),
        (1, "ocr_vqa/html.jpg", Reason.IMAGE_UNREADABLE),
        (2, "ocr_vqa/cut.jpg", Reason.IMAGE_TRUNCATED),
        (3, "ocr_vqa/animated.jpg", MISNAMED),
        (4, "ocr_vqa/renamed.jpg", Reason.IMAGE_MISSING),
        (5, "", Reason.NOT_A_ROW),
    ]
    assert [finding.repair for finding in result.findings if finding.repair] == ["ocr_vqa/Renamed.gif"]
    assert not list(tmp_path.glob("inspect-*")), "nothing stays behind"


def test_findings_other_than_remarks_are_what_preparation_quarantines(spec: PrepareSpec, tmp_path: Path) -> None:
    found = Counter(finding.reason for finding in check(spec, tmp_path).findings if finding.reason != MISNAMED)
    assert prepare_serially(spec).quarantine == found


def test_repair_links_the_file_and_changes_nothing_else(spec: PrepareSpec, tmp_path: Path) -> None:
    _, images = read_rows(spec)
    before = {path.name for path in (images / "ocr_vqa").iterdir()}
    assert repair_images(check(spec, tmp_path), [str(images)]) == 1
    assert {path.name for path in (images / "ocr_vqa").iterdir()} == before | {"renamed.jpg"}
    after = check(spec, tmp_path)
    assert [finding.reason for finding in after.findings if finding.row == 4] == [MISNAMED]
    assert repair_images(after, [str(images)]) == 0


def test_two_files_that_a_missing_name_could_mean_are_not_guessed_between(spec: PrepareSpec, tmp_path: Path) -> None:
    _, images = read_rows(spec)
    Image.new("RGB", (8, 8)).save(images / "ocr_vqa" / "renamed.png")
    assert not [finding for finding in check(spec, tmp_path).findings if finding.repair]


def test_list_of_findings_reads_back_and_holds_no_formula(spec: PrepareSpec, tmp_path: Path) -> None:
    rows, _ = read_rows(spec)
    rows[0] |= {"id": "=1+1", "image": "a\nb.jpg"}
    Path(spec.source_paths[0][0]).write_text(json.dumps(rows))
    table = list(csv.DictReader(io.StringIO(check(spec, tmp_path).to_csv().decode(), newline="")))
    assert table[0]["sample_id"].startswith("'=1+1")
    assert table[0]["image"] == "a\\x0ab.jpg"
    assert len(table) == 6


def test_name_that_cannot_be_linked_is_left_and_the_others_are_repaired(spec: PrepareSpec, tmp_path: Path) -> None:
    rows, images = read_rows(spec)
    rows[0]["image"] = "ocr_vqa/dangling.jpg"
    rows[6]["image"] = "ocr_vqa/renamed.jpg"  # the same as row 4
    (images / "ocr_vqa" / "dangling.jpg").symlink_to("nowhere.jpg")
    Image.new("P", (8, 8)).save(images / "ocr_vqa" / "dangling.gif", "GIF")
    Path(spec.source_paths[0][0]).write_text(json.dumps(rows))
    assert repair_images(check(spec, tmp_path), [str(images)]) == 1
    assert (images / "ocr_vqa" / "renamed.jpg").exists()
    assert (images / "ocr_vqa" / "dangling.jpg").is_symlink()
