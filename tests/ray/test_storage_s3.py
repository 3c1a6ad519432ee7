"""Storage paths on S3 (moto's server over HTTP), and files left by killed writers."""

import subprocess
import sys
from pathlib import Path

import pytest

from raylava import local_copies
from raylava.errors import UserError
from raylava.local_copies import local_copy
from raylava.storage import StoragePath, storage_path, writable


def test_s3_is_reached_through_boto3s_default_chain_and_reads_back_what_was_written(s3: str) -> None:
    root = writable(f"{s3}/storage-test")
    (root / "a" / "one").write_bytes(b"1")
    (root / "two").write_bytes(b"22")
    assert list(root.walk_files()) == [("a/one", 1), ("two", 2)]
    assert (root / "two").read_bytes() == b"22"
    assert local_copy(root / "two").read_bytes() == b"22"
    assert not (root / "lock").exists()
    assert (root / "lock").create_exclusively(b"mine")
    assert not (root / "lock").create_exclusively(b"theirs")
    root.delete()
    assert not list(root.walk_files())


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URIs that were downloaded."""
    uris: list[str] = []
    copy_to = StoragePath.copy_to

    def record(self: StoragePath, target: Path) -> None:
        uris.append(self.uri)
        copy_to(self, target)

    monkeypatch.setattr(StoragePath, "copy_to", record)
    return uris


def test_copy_of_a_bucket_is_kept_until_an_object_changes(s3: str, downloads: list[str]) -> None:
    folder = storage_path(f"{s3}/copied")
    (folder / "a" / "one").write_bytes(b"1")
    (folder / "two").write_bytes(b"2")
    first = local_copy(folder)
    assert local_copy(folder) == first
    assert len(downloads) == 1
    (folder / "two").write_bytes(b"3")  # of the same size, within the resolution of modification times
    second = local_copy(folder)
    assert (second / "two").read_bytes() == b"3"
    assert (second / "a" / "one").read_bytes() == b"1"
    assert len(downloads) == 2


def test_copy_that_was_damaged_on_disk_is_downloaded_again_by_another_process(s3: str, downloads: list[str]) -> None:
    file = storage_path(f"{s3}/damaged/weights")
    file.write_bytes(b"weights")
    local_copy(file).write_bytes(b"damaged")
    local_copies._checked.clear()  # as in another process
    assert local_copy(file).read_bytes() == b"weights"
    assert len(downloads) == 2


def test_copy_of_nothing_is_refused(s3: str) -> None:
    with pytest.raises(UserError, match="s3://bucket/nothing: no such file or folder"):
        local_copy(storage_path(f"{s3}/nothing"))


def test_an_object_is_not_mistaken_for_others_with_the_same_beginning(s3: str) -> None:
    (storage_path(f"{s3}/model") / "a").write_bytes(b"1")
    (storage_path(f"{s3}/model-2") / "b").write_bytes(b"2")
    assert [name for name, *_ in storage_path(f"{s3}/model").file_versions()] == ["/a"]


def test_missing_bucket_is_reported_in_one_line(s3: str) -> None:
    with pytest.raises(UserError, match="cannot write there") as error:
        writable("s3://no-such-bucket/x")
    assert "\n" not in str(error.value)


def test_only_the_temporary_files_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from raylava.storage import storage_path\n"
        "os.fsync = lambda _: os._exit(9)\n"  # killed after the content, before the rename
        "storage_path(sys.argv[1]).write_bytes(b'half')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "blocks" / "block.arrow")], check=False)
    (tmp_path / "blocks" / "whole.arrow").write_bytes(b"whole")
    assert len(list((tmp_path / "blocks").iterdir())) == 2
    storage_path(tmp_path).remove_partial_files()
    assert [file.name for file in (tmp_path / "blocks").iterdir()] == ["whole.arrow"]
