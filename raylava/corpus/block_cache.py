"""Blocks of a corpus in a bucket, on this node's disk: fetched once for all processes of the node, bounded, verified.

Which blocks are wanted when is the feed's business.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from raylava.corpus.blocks import LENGTHS, MANIFEST, BlockRecord, Blocks
from raylava.errors import RunError
from raylava.storage import StoragePath, cache_folder, retry, storage_path

_RETRY_SECONDS = 600.0


def cached_blocks(source: StoragePath, max_bytes: float) -> Blocks:
    """A prepared corpus: read where it lies when that is this node's disk, else through a cache of `max_bytes`."""
    if source.is_local:
        return Blocks.at(source)
    cache = BlockCache(source, max_bytes)
    for name in (MANIFEST, LENGTHS):
        content = retry((source / name).read_bytes, _RETRY_SECONDS, f"reading {source / name}")
        storage_path(cache.folder / name).write_bytes(content)
    return Blocks(cache.folder, cache.file)


class BlockCache:
    """A folder of copies that holds at most `max_bytes`: the copies unused for longest go first."""

    def __init__(self, source: StoragePath, max_bytes: float, retry_seconds: float = _RETRY_SECONDS) -> None:
        self._source, self._max_bytes, self._retry_seconds = source, max_bytes, retry_seconds
        self.folder = cache_folder() / "blocks" / hashlib.sha256(source.uri.encode()).hexdigest()[:24]
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, record: BlockRecord) -> Path:
        """A block's local copy, fetched if it is not there. Raises OSError when storage fails for too long, RunError
        for a block that is damaged at its source.
        """
        target = self.folder / Path(record.path).name
        with _locked(self.folder / f"{target.name}.lock"):
            if target.exists():
                os.utime(target)  # used now: the last to go
                return target
            self._fetch(record, target)
        self._trim(keep=target)
        return target

    def _fetch(self, record: BlockRecord, target: Path) -> None:
        source = self._source / record.path
        content = retry(source.read_bytes, self._retry_seconds, f"reading {source}")
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise RunError(f"{source}: damaged (its SHA-256 is not the manifest's); prepare again")
        storage_path(target).write_bytes(content)

    def _trim(self, keep: Path) -> None:
        """One process at a time looks; what another has just deleted counts as gone."""
        with _locked(self.folder / "trim.lock"):
            held = sorted(self._held(), key=lambda entry: entry[1])
            total = sum(size for _, _, size in held)
            for file, _, size in held:
                if total <= self._max_bytes:
                    return
                if file != keep:
                    file.unlink(missing_ok=True)
                    total -= size

    def _held(self) -> Iterator[tuple[Path, int, int]]:
        for file in self.folder.glob("*.arrow"):
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                yield file, status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
