"""The upload of a checkpoint is retried while storage fails; giving up names the last good checkpoint."""

import threading
from pathlib import Path

import pytest

from raylava.errors import RunError
from raylava.storage import storage_path
from raylava.train.checkpoints import upload_checkpoint
from tests.support.flaky_proxy import FlakyProxy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "shard.pt").write_bytes(b"weights" * 1000)
    return tmp_path


@pytest.mark.parametrize("mode", ["refusing", "hanging"])
def test_upload_is_retried_until_storage_recovers(
    mode: str, proxy: FlakyProxy, folder: Path, s3: str, caplog: pytest.LogCaptureFixture
) -> None:
    target = storage_path(f"{s3}/upload-{mode}")
    proxy.mode = mode
    thread = threading.Thread(target=upload_checkpoint, args=(folder, target, 120.0, lambda: "none"))
    thread.start()
    while "retrying" not in caplog.text:
        assert thread.is_alive()
    proxy.mode = "well"
    thread.join(timeout=100)
    assert not thread.is_alive()
    assert (target / "state/shard.pt").read_bytes() == b"weights" * 1000


def test_upload_that_keeps_failing_names_the_last_good_checkpoint(proxy: FlakyProxy, folder: Path, s3: str) -> None:
    proxy.mode = "refusing"
    with pytest.raises(RunError, match="the last good checkpoint is step-00000010"):
        upload_checkpoint(folder, storage_path(f"{s3}/upload-never"), 0.0, lambda: "step-00000010")
