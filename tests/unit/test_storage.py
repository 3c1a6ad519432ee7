"""Storage paths: atomic writes, exclusive creation, joining, errors."""

import os
from pathlib import Path

import pytest

from raylava.errors import UserError
from raylava.storage import join, retry, storage_path, writable


def test_failed_write_keeps_the_old_content_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = storage_path(tmp_path) / "record.json"
    file.write_bytes(b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        file.write_bytes(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    assert file.read_bytes() == b"old"


def test_exclusive_creation_succeeds_once(tmp_path: Path) -> None:
    file = storage_path(tmp_path) / "lock"
    assert file.create_exclusively(b"first")
    assert not file.create_exclusively(b"second")
    assert file.read_bytes() == b"first"


@pytest.mark.parametrize(
    ("root", "name", "joined"),
    [
        ("", "a.json", "a.json"),
        ("data", "a.json", "data/a.json"),
        ("s3://bucket/x/", "a.json", "s3://bucket/x/a.json"),
        ("data", "/tmp/a.json", "/tmp/a.json"),
        ("data", "s3://bucket/a.json", "s3://bucket/a.json"),
        ("data", "", "data/"),
    ],
)
def test_relative_names_are_joined_to_the_root(root: str, name: str, joined: str) -> None:
    assert join(root, name) == joined


def test_unsupported_scheme_is_a_user_error() -> None:
    with pytest.raises(UserError, match="cannot use 'ftp://host/x'"):
        storage_path("ftp://host/x")


def test_unwritable_storage_is_reported_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write there"):
        writable(str(tmp_path / "file" / "storage"))


def test_files_are_listed_recursively_with_their_sizes(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two").write_bytes(b"22")
    (tmp_path / "a").write_bytes(b"1")
    assert list(storage_path(tmp_path).walk_files()) == [("a", 1), ("b/two", 2)]


def test_retry_backs_off_exponentially_and_raises_the_last_error(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waits = 0.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        waits.append(seconds)

    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr("time.sleep", sleep)
    attempts = 0

    def fail() -> None:
        nonlocal attempts
        attempts += 1
        raise OSError(f"attempt {attempts}")

    with pytest.raises(OSError, match="attempt 4"):
        retry(fail, timeout_s=10.0, description="writing a file")
    assert waits == [1.0, 2.0, 4.0]


def test_retry_does_not_wait_for_a_missing_file() -> None:
    def missing() -> bytes:
        raise FileNotFoundError("no such file")

    with pytest.raises(FileNotFoundError):
        retry(missing, timeout_s=10.0, description="reading a file")


def test_listing_leaves_out_what_no_row_can_name_and_follows_looping_links_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "image.jpg").write_bytes(b"12")
    (tmp_path / "c").mkdir()
    (tmp_path / "a" / "to-c").symlink_to(tmp_path / "c")
    (tmp_path / "c" / "to-a").symlink_to(tmp_path / "a")
    (tmp_path / "x").symlink_to("y")
    (tmp_path / "y").symlink_to("x")
    os.mkfifo(tmp_path / "pipe")
    with open(os.fsencode(tmp_path) + b"/stray-\xff.jpg", "wb"):
        pass
    names = [name for name, _ in storage_path(tmp_path).walk_files()]
    assert names == ["a/b/image.jpg", "c/to-a/b/image.jpg"]
    assert [child.name for child in storage_path(tmp_path).children()] == ["a", "c", "pipe", "x", "y"]


def test_listing_of_a_folder_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    assert list(storage_path(tmp_path / "nothing").walk_files()) == []
    assert storage_path(tmp_path / "nothing").children() == []
