"""Storage paths on S3 (moto's server over HTTP), and files left by killed writers."""

import subprocess
import sys
from pathlib import Path

import pytest

from raylava.errors import UserError
from raylava.local_copies import local_copy
from raylava.storage import storage_path, writable


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
