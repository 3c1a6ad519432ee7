"""A bounded cache of remote blocks on this node's disk, shared by all processes of the node.

Each block is downloaded once, verified by its SHA-256, and evicted when it was least recently used.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from raylava.corpus.blocks import CORRUPT_BLOCK, LENGTHS, MANIFEST, BlockRecord, Blocks
from raylava.errors import RunError
from raylava.storage import StoragePath, cache_folder, retry, storage_path

_RETRY_TIMEOUT_S = 600.0


def open_blocks(source: StoragePath, max_bytes: float) -> Blocks:
    """Open a prepared corpus: in place when it is on this node's disk, else through a cache of `max_bytes` bytes."""
    if source.is_local:
        return Blocks.open(source)
    cache = BlockCache(source, max_bytes)
    for name in (MANIFEST, LENGTHS):
        content = retry((source / name).read_bytes, _RETRY_TIMEOUT_S, f"reading {source / name}")
        storage_path(cache.folder / name).write_bytes(content)
    return Blocks(cache.folder, cache.file)


class BlockCache:
    """A folder of downloaded blocks that holds at most `max_bytes` bytes; the least recently used are evicted first."""

    def __init__(self, source: StoragePath, max_bytes: float, retry_timeout_s: float = _RETRY_TIMEOUT_S) -> None:
        self._source, self._max_bytes, self._retry_timeout_s = source, max_bytes, retry_timeout_s
        self.folder = cache_folder() / "blocks" / hashlib.sha256(source.uri.encode()).hexdigest()[:24]
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, record: BlockRecord) -> Path:
        """Return the path of a block's local copy, downloading it if necessary.

        Raises OSError when storage keeps failing, and RunError when the block is corrupt in storage.
        """
        target = self.folder / Path(record.path).name
        with _locked(self.folder / f"{target.name}.lock"):
            if target.exists():
                os.utime(target)  # mark as most recently used
                return target
            self._fetch(record, target)
        self._evict(keep=target)
        return target

    def _fetch(self, record: BlockRecord, target: Path) -> None:
        source = self._source / record.path
        content = retry(source.read_bytes, self._retry_timeout_s, f"reading {source}")
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise RunError(f"{source}: {CORRUPT_BLOCK}")
        storage_path(target).write_bytes(content)

    def _evict(self, keep: Path) -> None:
        """Delete the least recently used blocks, except `keep`, until the cache is within its limit."""
        with _locked(self.folder / "evict.lock"):
            entries = sorted(self._entries(), key=lambda entry: entry[1])
            total = sum(size for _, _, size in entries)
            for file, _, size in entries:
                if total <= self._max_bytes:
                    return
                if file != keep:
                    file.unlink(missing_ok=True)
                    total -= size

    def _entries(self) -> Iterator[tuple[Path, int, int]]:
        """Yield (file, time of last use in ns, size in bytes); files that another process deletes are left out."""
        for file in self.folder.glob("*.arrow"):
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                yield file, status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
