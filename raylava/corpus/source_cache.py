"""What identifies the content of sources, resolved once: per process, per sweep, and per file in storage.

Hashing and scanning a large JSON file takes long. Its hash and the image paths in it are kept in storage under the
file's identity (location, size and modification time; of a local file also inode and change time), so that every later
command reads these instead. Image folders are listed by every command, because an image may have been added.
"""

import gzip
import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from raylava.corpus.sources import SourceFiles, file_sizes
from raylava.errors import UserError, first_line
from raylava.storage import StoragePath, storage_path

logger = logging.getLogger(__name__)

_VERSION = 1  # of the files in storage
_RECENT_SECONDS = 2.0  # a file that was just modified may be modified again without a new modification time


@dataclass(frozen=True)
class ScannedFile:
    """A hash of an annotation file, or of its size and end, and the image paths of the rows that the source selects."""

    content: Any
    images: list[str]


class SourceCache:
    """Returns what identifies a source's content. `known` holds the results that another process has computed."""

    def __init__(self, known: Mapping[str, dict[str, Any]] | None = None) -> None:
        self.known = dict(known or {})

    def fingerprint_fields(self, source: SourceFiles, folder: StoragePath) -> dict[str, Any]:
        """Return the hashes of the annotations and of the names and sizes of the images that rows refer to.

        The fields do not depend on the location. `folder` holds the results of scanned files. JSON files are hashed
        completely; Parquet files and tars, which may be terabytes, by their size and last 64 KiB. Raises UserError when
        annotations can't be read or the image folder is missing.
        """
        key = json.dumps([source.source.fingerprint_fields(), source.annotations, source.images])
        if key not in self.known:
            scanned = [_scan_once(source, file, folder) for file in source.files]
            names = {name for file in scanned for name in file.images}
            images = storage_path(source.images)
            if names and not images.is_folder():
                raise UserError(f"{images}: no such image folder; set the source's images (or data=…)")
            listing = json.dumps(sorted(file_sizes(images, names).items()))
            self.known[key] = {
                "annotations": [file.content for file in scanned],
                "images": hashlib.sha256(listing.encode()).hexdigest(),
            }
        return self.known[key]


def _scan_once(source: SourceFiles, file: StoragePath, folder: StoragePath) -> ScannedFile:
    """Scan a file unless a result for its identity is in `folder`. Without a modification time it is always scanned."""
    info = file.info()
    if info.mtime_ns is None or time.time() - info.mtime_ns / 1e9 < _RECENT_SECONDS:
        return _scan(source, file)
    selection = [source.source.format, source.source.include, source.source.exclude]
    identity = json.dumps([_VERSION, file.uri, info.size, info.mtime_ns, _local_identity(file), selection])
    cached = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.scan"
    try:
        return _read(cached.uri)
    except (FileNotFoundError, NotADirectoryError):
        scanned = _scan(source, file)
        _write(scanned, cached)
        return scanned


def _local_identity(file: StoragePath) -> list[int]:
    """Return what changes when a local file is replaced or rewritten, even if its modification time is set back."""
    if not file.is_local:
        return []
    status = os.stat(file.path)
    return [status.st_ino, status.st_ctime_ns]


def _write(scanned: ScannedFile, cached: StoragePath) -> None:
    content = json.dumps(asdict(scanned), ensure_ascii=False).encode(errors="surrogatepass")
    try:
        cached.write_bytes(gzip.compress(content, compresslevel=1, mtime=0))
    except OSError as error:  # commands that only read, such as `status`, may not be allowed to write
        logger.warning("the scan of a source could not be kept in %s: %s", cached, first_line(error))


@lru_cache(maxsize=16)
def _read(uri: str) -> ScannedFile:
    content = gzip.decompress(storage_path(uri).read_bytes()).decode(errors="surrogatepass")
    return ScannedFile(**json.loads(content))


def _scan(source: SourceFiles, file: StoragePath) -> ScannedFile:
    return ScannedFile(source.content_hash(file), sorted(set(source.image_names(file))))
