"""A checkpoint's upload waits for storage that comes back, and names the last good one when it does not."""

import threading
from pathlib import Path

import pytest

from raylava.errors import RunError
from raylava.storage import storage_path
from raylava.train.upload import upload
from tests.support.flaky_proxy import FlakyProxy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "shard.pt").write_bytes(b"weights" * 1000)
    return tmp_path


@pytest.mark.parametrize("mode", ["refusing", "hanging"])
def test_it_is_tried_again_until_storage_is_back(
    mode: str, proxy: FlakyProxy, folder: Path, s3: str, caplog: pytest.LogCaptureFixture
) -> None:
    target = storage_path(f"{s3}/upload-{mode}")
    proxy.mode = mode
    uploading = threading.Thread(target=upload, args=(folder, target, 120.0, lambda: "none"))
    uploading.start()
    while "trying again" not in caplog.text:
        assert uploading.is_alive()
    proxy.mode = "well"
    uploading.join(timeout=100)
    assert not uploading.is_alive()
    assert (target / "state/shard.pt").read_bytes() == b"weights" * 1000


def test_when_it_never_comes_back_the_last_good_checkpoint_is_named(proxy: FlakyProxy, folder: Path, s3: str) -> None:
    proxy.mode = "refusing"
    with pytest.raises(RunError, match="the last good checkpoint is step-00000010"):
        upload(folder, storage_path(f"{s3}/upload-never"), 0.0, lambda: "step-00000010")
