"""Scanning and reading rows of every format; other files are rejected with a one-line error."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylava.corpus import formats
from raylava.corpus.formats import FORMATS, format_of
from raylava.errors import UserError
from raylava.storage import StoragePath, storage_path

TALK = [{"from": "human", "value": "Hi <image>"}, {"from": "gpt", "value": "naïve 日本 🦙"}]


def scan_and_read(name: str, file: StoragePath) -> list[Any]:
    """Return all rows, read by their serialized offsets; every second row must read the same on its own."""
    file_format = FORMATS[name]
    offsets = json.loads(json.dumps([row_ref.offset for row_ref in file_format.scan(file)]))
    rows = list(file_format.read_rows(file, offsets))
    assert list(file_format.read_rows(file, offsets[1::2])) == rows[1::2]
    return rows


@settings(max_examples=50)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=12) | st.integers(), max_size=3), max_size=8),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_json_list_reads_the_same_at_any_chunk_size(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], chunk: int, indent: int | None, ascii_only: bool
) -> None:
    rows = [*rows, {"conversations": TALK}, 12, 3.25, "text", None]
    file = tmp_path_factory.mktemp("json") / "rows.json"
    file.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "READ_BYTES", chunk)
        assert scan_and_read("llava_json", storage_path(file)) == rows


DEEP = "[" * 3000 + "]" * 3000


@pytest.mark.parametrize("name", ["llava_json", "jsonl"])
@pytest.mark.parametrize("chunk", [7, 8 << 20])
@pytest.mark.parametrize(
    "bad", ["9" * 5000, f'{{"a": {DEEP}, "b": "]\\"}},"}}', DEEP], ids=["digits", "row", "nesting"]
)
def test_value_that_python_cannot_read_is_one_bad_row(tmp_path: Path, name: str, chunk: int, bad: str) -> None:
    rows = [json.dumps({"conversations": TALK}), bad, json.dumps({"id": 2, "conversations": TALK})]
    file = tmp_path / "rows"
    file.write_text(f"[{', '.join(rows)}]" if name == "llava_json" else "\n".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "READ_BYTES", chunk)
        read = scan_and_read(name, storage_path(file))
    assert (read[0], read[2]) == (json.loads(rows[0]), json.loads(rows[2]))
    assert read[1].startswith("JSON that cannot be read: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "does not begin with"),
        ('{"a": 1}', "does not begin with"),
        ("[]", "non-empty list"),
        ("", "list is not closed"),
        ('[{"conversations": []}', "list is not closed"),
        ('[{"conversations": []}, {]', "not JSON at byte 24"),
        ('[{"text": "x"}]', "no row has `conversations`"),
    ],
)
def test_invalid_llava_json_is_rejected_with_its_position(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(UserError, match=message):
        list(FORMATS["llava_json"].scan(storage_path(tmp_path / "rows.json")))


def test_json_must_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes('[{"conversations": "é"}]'.encode("latin-1"))
    with pytest.raises(UserError, match="must be UTF-8"):
        list(FORMATS["llava_json"].scan(storage_path(tmp_path / "rows.json")))


def test_json_lines_skips_empty_lines_and_yields_malformed_lines_as_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{json.dumps({"conversations": TALK}, ensure_ascii=False)}\n\n{{broken\n{{"id": 3}}')
    rows = scan_and_read("jsonl", storage_path(file))
    assert rows[0] == {"conversations": TALK}
    assert rows[1].startswith("not JSON: ")
    assert rows[2] == {"id": 3}


def test_parquet_rows_are_read_from_row_groups_with_embedded_images(tmp_path: Path) -> None:
    rows = [{"id": str(n), "image": {"bytes": b"image", "path": None}, "conversations": TALK} for n in range(7)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=3)
    assert scan_and_read("parquet", storage_path(tmp_path / "rows.parquet")) == rows


@pytest.mark.parametrize("content", [b"not parquet", None])
def test_parquet_without_conversations_is_rejected(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "rows.parquet"
    if content is None:
        pq.write_table(pa.table({"text": ["x"]}), file)
    else:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"rows\.parquet: (not Parquet|has neither)"):
        list(FORMATS["parquet"].scan(storage_path(file)))


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> StoragePath:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return storage_path(file)


def test_webdataset_groups_members_by_name(tmp_path: Path) -> None:
    row = json.dumps({"conversations": TALK}).encode()
    members = [
        ("a/000.jpg", b"jpeg"),
        ("a/000.json", row),
        ("a/001.txt", b"a caption"),
        ("a/001.png", b"png"),
        ("a/002.0.jpg", b"first"),
        ("a/002.1.jpg", b"second"),
        ("a/002.json", row),
        ("a/003.cls", b"7"),
    ]
    rows = scan_and_read("webdataset", write_tar(tmp_path / "x.tar", members))
    assert rows[0] == {"id": "a/000", "image": [b"jpeg"], "conversations": TALK}
    caption = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a caption"}]
    assert rows[1] == {"id": "a/001", "image": [b"png"], "conversations": caption}
    assert rows[2]["image"] == [b"first", b"second"]
    assert rows[3].startswith("a/003: has neither")


def test_truncated_or_invalid_tar_is_rejected(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "x.tar", [("a.json", b"x" * 5000), ("a.jpg", b"y" * 5000)])
    for name, content in (("cut.tar", whole.read_bytes()[:6200]), ("none.tar", b"nothing of the kind" * 100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: not a tar, or truncated"):
            list(FORMATS["webdataset"].scan(storage_path(tmp_path / name)))


def test_format_follows_from_the_file_suffix(tmp_path: Path) -> None:
    names = {"a.json": "llava_json", "a.JSONL": "jsonl", "a.parquet": "parquet", "a-000.tar": "webdataset"}
    assert {name: format_of(storage_path(tmp_path / name)) for name in names} == names
    with pytest.raises(UserError, match="set format to one of"):
        format_of(storage_path(tmp_path / "a.csv"))
