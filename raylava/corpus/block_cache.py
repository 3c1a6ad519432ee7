"""A bounded cache of remote blocks on this node's disk, shared by all processes of the node.

Each block is downloaded once and evicted when it was least recently used. Every process verifies the SHA-256 of a block
when it first reads it, and downloads a block again that was damaged on disk.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from raylava.config.recipe import DEFAULT_CACHE_GB
from raylava.corpus.blocks import CORRUPT_BLOCK, LENGTHS, MANIFEST, BlockRecord, Blocks
from raylava.errors import RunError
from raylava.local_copies import file_lock
from raylava.storage import StoragePath, cache_folder, retry, storage_path

logger = logging.getLogger(__name__)

_RETRY_TIMEOUT_S = 600.0


def open_blocks(source: StoragePath, max_bytes: float = 1e9 * DEFAULT_CACHE_GB) -> Blocks:
    """Open a prepared corpus: in place when it is on this node's disk, else through a cache of `max_bytes` bytes."""
    if source.is_local:
        return Blocks(Path(source.path))
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
        self._verified: set[Path] = set()

    def file(self, record: BlockRecord) -> Path:
        """Return the path of a block's local copy, downloading it if necessary.

        Raises OSError when storage keeps failing, and RunError when the block is corrupt in storage.
        """
        target = self.folder / f"{record.sha256[:32]}.arrow"
        with file_lock(self.folder / f"{target.name}.lock"):
            if self._is_intact(target, record):
                os.utime(target)  # mark as most recently used
                return target
            self._fetch(record, target)
            self._verified.add(target)
        self._evict(keep=target)
        return target

    def _is_intact(self, target: Path, record: BlockRecord) -> bool:
        """Return whether a block is cached, and has the bytes of the manifest when this process first reads it."""
        if not target.exists():
            return False
        if target not in self._verified:
            if storage_path(target).sha256() != record.sha256:
                logger.warning("%s: changed since it was downloaded; downloading it again", target)
                return False
            self._verified.add(target)
        return True

    def _fetch(self, record: BlockRecord, target: Path) -> None:
        source = self._source / record.path
        content = retry(source.read_bytes, self._retry_timeout_s, f"reading {source}")
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise RunError(f"{source}: {CORRUPT_BLOCK}")
        storage_path(target).write_bytes(content)

    def _evict(self, keep: Path) -> None:
        """Delete the least recently used blocks, except `keep`, until the cache is within its limit."""
        with file_lock(self.folder / "evict.lock"):
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
