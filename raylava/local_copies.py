"""Copies of remote files and folders on this node's disk, each downloaded once for all processes of the node.

A copy is keyed by the identity of the remote content (ETags on S3, elsewhere sizes and modification times), so that a
changed folder is downloaded again. The SHA-256 of its files is kept beside it, and compared again by the first process
that finds a file with another size, inode or time than when it was last compared.
"""

import fcntl
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raylava.errors import UserError
from raylava.storage import StoragePath, cache_folder, folder_sha256, retry

logger = logging.getLogger(__name__)

HASHES_FILE = "sha256.json"  # SHA-256 by path, of the files beside it and below
_RETRY_TIMEOUT_S = 600.0
_checked: set[Path] = set()  # the copies whose hashes this process has compared


def local_copy(path: StoragePath) -> Path:
    """Return a local path with the content of a file or folder: its own if it is local, else that of a copy.

    Raises UserError when there is nothing at a remote path, OSError when storage keeps failing.
    """
    if path.is_local:
        return Path(path.path)
    versions = retry(path.file_versions, _RETRY_TIMEOUT_S, f"listing {path}")
    if not versions:
        raise UserError(f"{path}: no such file or folder")
    identity = hashlib.sha256(json.dumps([path.uri, versions]).encode()).hexdigest()[:32]
    folder = cache_folder() / "copies" / identity
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder.parent}: the cache cannot be written ({error.strerror}); set XDG_CACHE_HOME"
        ) from error
    with file_lock(folder.with_suffix(".lock")):
        if not _is_intact(folder):
            _download(path, folder)
        _checked.add(folder)
    return folder / path.name


def _is_intact(folder: Path) -> bool:
    """Return whether a folder has a complete copy; its hashes are compared when this process first uses it."""
    hashes = folder / HASHES_FILE
    if not hashes.exists():
        return False
    if folder in _checked or _read_stats(folder) == _file_stats(folder):
        return True
    content = {name: digest for name, digest in folder_sha256(folder).items() if name != HASHES_FILE}
    if content == json.loads(hashes.read_text()):
        _keep_stats(folder)
        return True
    logger.warning("%s: changed since it was downloaded; downloading it again", folder)
    return False


def _file_stats(folder: Path) -> dict[str, list[int]]:
    """Return the size, inode, modification and change time of each file of a copy: hashing models takes too long."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    stats = ((file, file.stat()) for file in files)
    return {
        str(file.relative_to(folder)): [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
        for file, stat in stats
    }


def _stats_file(folder: Path) -> Path:
    return folder.with_suffix(".stats")


def _keep_stats(folder: Path) -> None:
    _stats_file(folder).write_text(json.dumps(_file_stats(folder)))


def _read_stats(folder: Path) -> dict[str, list[int]] | None:
    try:
        return dict(json.loads(_stats_file(folder).read_text()))
    except (OSError, ValueError):
        return None


def _download(path: StoragePath, folder: Path) -> None:
    """Download to a temporary folder and rename it: a reader sees a complete copy or none."""
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix="partial-"))
    try:
        retry(lambda: path.copy_to(partial / path.name), _RETRY_TIMEOUT_S, f"reading {path}")
        (partial / HASHES_FILE).write_text(json.dumps(folder_sha256(partial)))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        _keep_stats(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def file_lock(file: Path) -> Iterator[None]:
    """Hold an exclusive lock among the processes and threads of this node; `file` is created."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
