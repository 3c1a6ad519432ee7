"""Any URI is a place; what is written there is whole or absent."""

import subprocess
import sys
from pathlib import Path

import pytest

from raylava.errors import UserError
from raylava.storage import join, storage_path, writable


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = storage_path(tmp_path) / "record.json"
    file.write_bytes(b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        file.write_bytes(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    assert file.read_bytes() == b"old"


def test_a_file_is_created_exclusively_once(tmp_path: Path) -> None:
    file = storage_path(tmp_path) / "lock"
    assert file.create_exclusively(b"first")
    assert not file.create_exclusively(b"second")
    assert file.read_bytes() == b"first"


@pytest.mark.parametrize(
    ("root", "name", "whole"),
    [
        ("", "a.json", "a.json"),
        ("data", "a.json", "data/a.json"),
        ("s3://bucket/x/", "a.json", "s3://bucket/x/a.json"),
        ("data", "/tmp/a.json", "/tmp/a.json"),
        ("data", "s3://bucket/a.json", "s3://bucket/a.json"),
        ("data", "", "data/"),
    ],
)
def test_relative_names_start_from_the_root(root: str, name: str, whole: str) -> None:
    assert join(root, name) == whole


def test_a_scheme_nobody_serves_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="cannot use 'ftp://host/x'"):
        storage_path("ftp://host/x")


def test_a_storage_that_cannot_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write there"):
        writable(str(tmp_path / "file" / "storage"))


def test_files_below_are_listed_by_relative_path_with_their_sizes(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two").write_bytes(b"22")
    (tmp_path / "a").write_bytes(b"1")
    assert list(storage_path(tmp_path).walk_files()) == [("a", 1), ("b/two", 2)]


def test_s3_is_reached_by_the_ordinary_chain_and_reads_back_what_was_written(s3: str, tmp_path: Path) -> None:
    root = writable(f"{s3}/storage-test")
    (root / "a" / "one").write_bytes(b"1")
    (root / "two").write_bytes(b"22")
    assert list(root.walk_files()) == [("a/one", 1), ("two", 2)]
    assert (root / "two").read_bytes() == b"22"
    assert (root / "two").local_copy().read_bytes() == b"22"
    assert not (root / "lock").exists()
    assert (root / "lock").create_exclusively(b"mine")
    assert not (root / "lock").create_exclusively(b"theirs")
    root.delete()
    assert not list(root.walk_files())


def test_a_missing_bucket_is_told_in_one_line(s3: str) -> None:
    with pytest.raises(UserError, match="cannot write there") as error:
        writable("s3://no-such-bucket/x")
    assert "\n" not in str(error.value)


def test_what_a_killed_writer_left_is_forgotten_and_nothing_else(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from raylava.storage import place\n"
        "os.fsync = lambda _: os._exit(9)\n"  # killed after the content, before the rename
        "storage_path(sys.argv[1]).write_bytes(b'half')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "blocks" / "block.arrow")], check=False)
    (tmp_path / "blocks" / "whole.arrow").write_bytes(b"whole")
    assert len(list((tmp_path / "blocks").iterdir())) == 2
    storage_path(tmp_path).remove_partial_files()
    assert [file.name for file in (tmp_path / "blocks").iterdir()] == ["whole.arrow"]
