"""The index of an annotation file: the same rows and hash however the file is split, read and kept."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylava.corpus import json_formats, row_index
from raylava.corpus.formats import FORMATS
from raylava.corpus.row_format import parse_json
from raylava.corpus.row_index import AnnotationFile, RowIndexes
from raylava.errors import UserError
from raylava.storage import storage_path

OLD = 1_700_000_000


def read_back(index: row_index.RowIndex, file: Path, format_name: str) -> list[Any]:
    offsets = [json.loads(offset) for offset, _ in index.rows()]
    return list(FORMATS[format_name].read_rows(storage_path(file), offsets))


LINES = st.lists(
    st.dictionaries(st.sampled_from(["id", "image"]), st.text(max_size=9), max_size=2).map(json.dumps)
    | st.sampled_from(["", "  ", "not JSON", '"日本"']),
    min_size=1,
    max_size=12,
)


@given(LINES, st.integers(1, 60), st.integers(1, 60), st.booleans())
@settings(max_examples=200, deadline=None)
def test_json_lines_in_parts_have_the_rows_of_the_whole_file_whatever_the_sizes(
    lines: list[str], part_bytes: int, read_bytes: int, ends_with_newline: bool
) -> None:
    content = "\n".join(lines) + ("\n" if ends_with_newline else "")
    expected = [line for line in content.split("\n") if line.strip()]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_index, "PART_BYTES", part_bytes)
        patch.setattr(json_formats, "READ_BYTES", read_bytes)
        file = Path(folder) / "rows.jsonl"
        file.write_text(content)
        os.utime(file, (OLD, OLD))
        if not expected:
            with pytest.raises(UserError, match="contains no rows"):
                RowIndexes().get(storage_path(file), "jsonl")
            return
        index = RowIndexes(storage_path(folder) / "kept").get(storage_path(file), "jsonl")
        assert read_back(index, file, "jsonl") == [parse_json(line.encode()) for line in expected]
        again = RowIndexes(storage_path(folder) / "kept").get(storage_path(file), "jsonl")
        assert list(again.rows()) == list(index.rows())
        assert again.content == index.content
        patch.setattr(json_formats, "READ_BYTES", read_bytes + 7)
        assert RowIndexes().get(storage_path(file), "jsonl").content == index.content


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_every_byte_of_a_json_file_counts_in_its_hash(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_formats, "READ_BYTES", 2)
    row = json.dumps({"id": 1, "conversations": []})
    content = f"[{row}, {row}]  \n \n" if name == "rows.json" else f"{row}\n\n{row}\n \n"
    hashes = set()
    for position in range(len(content) + 1):
        changed = content[:position] + " " + content[position:]
        (tmp_path / name).write_text(changed)
        try:
            hashes.add(RowIndexes().get(storage_path(tmp_path / name), FORMAT_OF[name]).content)
        except UserError:  # a blank inside of a word
            hashes.add(changed)
    distinct = {content[:position] + " " + content[position:] for position in range(len(content) + 1)}
    assert len(hashes) == len(distinct)


FORMAT_OF = {"rows.json": "llava_json", "rows.jsonl": "jsonl"}


def test_image_paths_that_no_arrow_string_can_hold_are_kept(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"image": "\\ud800.png"}\n{"image": ["a\\u0000", "b"]}\n{"image": null}\n')
    index = RowIndexes().get(storage_path(tmp_path / "rows.jsonl"), "jsonl")
    assert [names for _, names in index.rows()] == [["\ud800.png"], ["a\x00", "b"], []]


def test_index_that_is_not_complete_is_built_again(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n')
    os.utime(tmp_path / "rows.jsonl", (OLD, OLD))
    kept = storage_path(tmp_path / "kept")
    files = [AnnotationFile(storage_path(tmp_path / "rows.jsonl").uri, "jsonl")]
    RowIndexes(kept).build(files)
    assert RowIndexes(kept).missing(files) == {}
    (record,) = (tmp_path / "kept").glob("*.json")
    record.unlink()
    assert RowIndexes(kept).missing(files) == {files[0]: 10}


def test_bad_file_is_named_whichever_process_reads_it(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(UserError, match=r"rows.json: not LLaVA JSON"):
        RowIndexes().get(storage_path(tmp_path / "rows.json"), "llava_json")
