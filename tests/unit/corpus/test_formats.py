"""Scanning and reading rows of every format; other files are rejected with a one-line error."""

import gzip
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylava.corpus import json_formats
from raylava.corpus.formats import FORMATS, format_of
from raylava.corpus.row_format import Part
from raylava.errors import RunError, UserError
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
        patch.setattr(json_formats, "READ_BYTES", chunk)
        assert scan_and_read("llava_json", storage_path(file)) == rows


DEEP = "[" * 3000 + "]" * 3000  # more than Python 3.11 reads
LESS_DEEP = "[" * 501 + "]" * 501


@pytest.mark.parametrize("name", ["llava_json", "jsonl"])
@pytest.mark.parametrize("chunk", [7, 8 << 20])
@pytest.mark.parametrize(
    "bad",
    ["9" * 5000, f'{{"a": {DEEP}, "b": "]\\"}},"}}', DEEP, LESS_DEEP],
    ids=["digits", "row", "nesting", "less nesting"],
)
def test_value_that_python_cannot_read_is_one_bad_row(tmp_path: Path, name: str, chunk: int, bad: str) -> None:
    rows = [json.dumps({"conversations": TALK}), bad, json.dumps({"id": 2, "conversations": TALK})]
    file = tmp_path / "rows"
    file.write_text(f"[{', '.join(rows)}]" if name == "llava_json" else "\n".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_formats, "READ_BYTES", chunk)
        read = scan_and_read(name, storage_path(file))
    assert (read[0], read[2]) == (json.loads(rows[0]), json.loads(rows[2]))
    assert read[1].startswith("JSON that cannot be read: ")


def test_row_of_many_brackets_or_of_some_depth_is_read(tmp_path: Path) -> None:
    row = {"conversations": TALK, "extra": [[] for _ in range(600)], "deep": json.loads("[" * 400 + "]" * 400)}
    file = tmp_path / "rows"
    file.write_text(json.dumps(row))
    assert scan_and_read("jsonl", storage_path(file)) == [row]


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


ROWS = [{"id": str(number), "conversations": TALK} for number in range(3)]


@pytest.mark.parametrize("name", ["llava_json", "jsonl"])
@pytest.mark.parametrize("chunk", [1, 8 << 20])
def test_byte_order_mark_is_skipped(name: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(ROWS) if name == "llava_json" else "\n".join(map(json.dumps, ROWS))
    (tmp_path / "rows").write_text(text, encoding="utf-8-sig")
    monkeypatch.setattr(json_formats, "READ_BYTES", chunk)
    assert scan_and_read(name, storage_path(tmp_path / "rows")) == ROWS


@pytest.mark.parametrize("name", ["llava_json", "jsonl", "webdataset"])
def test_compressed_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    with pytest.raises(UserError, match=r"rows: compressed with gzip, .*; decompress it"):
        list(FORMATS[name].scan(storage_path(tmp_path / "rows")))


@pytest.mark.parametrize("name", ["llava_json", "jsonl"])
def test_utf_16_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "rows").write_text(json.dumps(ROWS), encoding="utf-16")
    with pytest.raises(UserError, match="rows: UTF-16 or UTF-32; convert it to UTF-8"):
        list(FORMATS[name].scan(storage_path(tmp_path / "rows")))


def test_wrong_comma_is_reported_without_reading_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.dumps(ROWS[0]) + ', {"id": 1,, "conversations": []}, ' + json.dumps([ROWS[0]] * 1000)[1:]
    (tmp_path / "rows.json").write_text(f"[{rows}")
    monkeypatch.setattr(json_formats, "READ_BYTES", 1000)
    part = Part(0, 1 << 40)
    read: list[int] = []
    monkeypatch.setattr(Part, "update", lambda self, position, content: read.append(len(content)))
    with pytest.raises(UserError, match=r"not JSON at byte \d+: "):
        list(FORMATS["llava_json"].scan(storage_path(tmp_path / "rows.json"), part))
    assert sum(read) <= 1000


def test_parquet_reads_its_own_columns_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.Table.from_pylist([row | {"depth_map": b"x" * 1000} for row in ROWS * 100])
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=300)
    requests: list[tuple[int, list[str]]] = []
    iter_batches = pq.ParquetFile.iter_batches

    def record(self: Any, batch_size: int, **settings: Any) -> Any:
        requests.append((batch_size, settings["columns"]))
        return iter_batches(self, batch_size, **settings)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", record)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *_: pytest.fail("a whole row group was read"))
    offsets = [[0, 0], [0, 0], [0, 63], [0, 64], [0, 299]]
    rows = list(FORMATS["parquet"].read_rows(storage_path(tmp_path / "rows.parquet"), offsets))
    assert [row["id"] for row in rows] == ["0", "0", "0", "1", "2"]
    assert requests == [(64, ["id", "conversations"])]


def test_parquet_text_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    ids = pa.array([b"0", b"\xff", b"2"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": ids, "conversations": [TALK] * 3}), tmp_path / "rows.parquet")
    rows = scan_and_read("parquet", storage_path(tmp_path / "rows.parquet"))
    assert [row["id"] for row in rows[::2]] == ["0", "2"]
    assert rows[1].startswith("cannot be read: UnicodeDecodeError")


def test_damaged_parquet_row_group_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS * 50), file, use_dictionary=False)
    content = bytearray(file.read_bytes())
    content[10:200] = b"\xff" * 190
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"rows\.parquet: row group 0 cannot be read"):
        list(FORMATS["parquet"].read_rows(storage_path(file), [[0, 0], [0, 149]]))


def tar_with(file: Path, kind: bytes, name: str) -> StoragePath:
    """Write a tar of two samples, of which the first has a member of this kind and name."""
    row = json.dumps({"conversations": TALK}).encode()
    with tarfile.open(file, "w") as tar:
        for member, member_kind in (("a.json", tarfile.REGTYPE), (name, kind), ("b.json", tarfile.REGTYPE)):
            info = tarfile.TarInfo(member)
            info.type, info.size = member_kind, len(row) if member_kind == tarfile.REGTYPE else 0
            info.linkname = "b.json" if member_kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(info, io.BytesIO(row))
    return storage_path(file)


@pytest.mark.parametrize(
    ("kind", "name", "problem"),
    [
        (tarfile.SYMTYPE, "a.jpg", "a: its jpg is a link or device"),
        (tarfile.LNKTYPE, "a.jpg", "a: its jpg is a link or device"),
        (tarfile.FIFOTYPE, "a.jpg", "a: its jpg is a link or device"),
        (tarfile.REGTYPE, "a.json", "a: has two files json"),
    ],
)
def test_tar_member_that_is_no_file_makes_its_sample_one_bad_row(
    kind: bytes, name: str, problem: str, tmp_path: Path
) -> None:
    rows = scan_and_read("webdataset", tar_with(tmp_path / "x.tar", kind, name))
    assert rows[0].startswith(problem)
    assert rows[1]["id"] == "b"


def test_sparse_tar_member_is_refused_by_name(tmp_path: Path) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x" * 4096)
    (tmp_path / "a.json").write_text(json.dumps({"conversations": TALK}))
    command = ["tar", "--sparse", "-cf", "x.tar", "a.jpg", "a.json"]
    subprocess.run(command, cwd=tmp_path, check=True)
    (row,) = scan_and_read("webdataset", storage_path(tmp_path / "x.tar"))
    assert row == "a: its jpg is stored as a sparse file, which is not supported"


def test_member_named_key_is_not_mistaken_for_the_samples_key(tmp_path: Path) -> None:
    members = [("a.json", json.dumps({"conversations": TALK}).encode()), ("a.key", b"1")]
    (row,) = scan_and_read("webdataset", write_tar(tmp_path / "x.tar", members))
    assert row == {"id": "a", "conversations": TALK}


def test_damaged_header_or_a_second_tar_does_not_hide_the_rest(tmp_path: Path) -> None:
    row = json.dumps({"conversations": TALK}).encode()
    whole = Path(write_tar(tmp_path / "x.tar", [(f"{name}.json", row) for name in "abcd"]).path).read_bytes()
    damaged = bytearray(whole)
    damaged[2 * 512 + 10] ^= 1  # in the name of the second header
    for content in (bytes(damaged), whole + whole):
        (tmp_path / "y.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"y\.tar: a damaged header at byte \d+, or a second tar after it"):
            list(FORMATS["webdataset"].scan(storage_path(tmp_path / "y.tar")))


def test_tar_whose_first_member_begins_like_a_compressed_file_is_read(tmp_path: Path) -> None:
    members = [("BZh9.json", json.dumps({"conversations": TALK}).encode())]
    (row,) = scan_and_read("webdataset", write_tar(tmp_path / "x.tar", members))
    assert row["id"] == "BZh9"
