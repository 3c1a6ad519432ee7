"""A URI (a path, s3://, gs://, any pyarrow filesystem) as a place to read from and publish to.

Writes are atomic: a reader sees a whole file or none. What the files mean is artifacts.py's business.
"""

import hashlib
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import boto3
import pyarrow.fs as pafs

from raylava.errors import UserError, first_line

logger = logging.getLogger(__name__)

_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0

T = TypeVar("T")


@dataclass(frozen=True)
class StoragePath:
    """A file or folder on some filesystem: `filesystem` is pyarrow's, `path` is the path within it."""

    filesystem: pafs.FileSystem
    path: str
    uri: str

    def __truediv__(self, name: str) -> "StoragePath":
        return StoragePath(self.filesystem, f"{self.path.rstrip('/')}/{name}", f"{self.uri.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def exists(self) -> bool:
        return self.info().type != pafs.FileType.NotFound

    def is_folder(self) -> bool:
        return self.info().type == pafs.FileType.Directory

    def info(self) -> pafs.FileInfo:
        return self.filesystem.get_file_info([self.path])[0]

    def read_bytes(self) -> bytes:
        """The file's content. Raises FileNotFoundError when it is not there."""
        with self.filesystem.open_input_stream(self.path) as stream:
            return stream.read()

    def write_bytes(self, content: bytes) -> None:
        """Write the whole file at once; a reader sees the old file or the new one, never a part."""
        if not self.is_local:  # an object store shows an object only when it is whole
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(content)
            return
        target = Path(self.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            with part.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def remove_partial_files(self) -> None:
        """Remove what writers killed within this folder have left of files; for when nobody writes there any more."""
        if self.is_local:
            for part in Path(self.path).rglob(".*.part"):
                part.unlink(missing_ok=True)

    def create_exclusively(self, content: bytes) -> bool:
        """Write the file unless it exists; False when it does.

        Exclusive on local filesystems. Elsewhere the last of two simultaneous writers wins: read back to know who did.
        """
        if not self.is_local:
            if self.exists():
                return False
            self.write_bytes(content)
            return self.read_bytes() == content
        target = Path(self.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
        part.write_bytes(content)
        try:
            os.link(part, target)  # whole or not at all: nobody reads a half-written lock
        except FileExistsError:
            return False
        finally:
            part.unlink()
        return True

    def make_folder(self) -> None:
        self.filesystem.create_dir(self.path, recursive=True)

    def delete(self) -> None:
        """Remove the file or the folder with all it holds; nothing happens when it is not there."""
        kind = self.info().type
        if kind == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.path)
        elif kind == pafs.FileType.File:
            self.filesystem.delete_file(self.path)

    def children(self) -> list["StoragePath"]:
        """What lies directly in this folder, by name; empty when there is no such folder."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        names = sorted(info.base_name for info in self.filesystem.get_file_info(selector))
        return [self / name for name in names]

    def walk_files(self) -> Iterator[tuple[str, int]]:
        """(path relative to this folder, size in bytes) of every file below, sorted by path."""
        selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        base = self.path.rstrip("/") + "/"
        found = [info for info in self.filesystem.get_file_info(selector) if info.type == pafs.FileType.File]
        yield from sorted((info.path.removeprefix(base), info.size) for info in found)

    def sha256(self) -> str:
        """The hexadecimal SHA-256 of the file, read as a stream."""
        digest = hashlib.sha256()
        with self.filesystem.open_input_stream(self.path) as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def upload_folder(self, folder: Path) -> None:
        """Copy everything in a local folder into this one."""
        self.make_folder()
        pafs.copy_files(
            str(folder), self.path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=self.filesystem
        )

    def copy_to(self, target: Path) -> None:
        """Copy this file or folder to a local path."""
        local = pafs.LocalFileSystem()
        pafs.copy_files(self.path, str(target), source_filesystem=self.filesystem, destination_filesystem=local)

    def local_copy(self) -> Path:
        """The file or folder as a local path: itself when local, else a copy in this user's cache, made once.

        Only for what never changes once written (artifacts, models): the cache is keyed by the URI.
        """
        if self.is_local:
            return Path(self.path)
        cached = cache_folder() / hashlib.sha256(self.uri.encode()).hexdigest()[:24] / self.name
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=cached.parent))
            self.copy_to(part / self.name)
            if not cached.exists():
                (part / self.name).rename(cached)
            shutil.rmtree(part, ignore_errors=True)
        return cached


def cache_folder() -> Path:
    """Where copies of remote files are kept on this node (XDG_CACHE_HOME decides, as for other programs)."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "raylava"


def storage_path(uri: str | Path) -> StoragePath:
    """The place that a path or URI names. Raises UserError for a scheme that no filesystem serves."""
    text = str(uri)
    if "://" not in text:
        local = str(Path(text).expanduser().absolute())
        return StoragePath(pafs.LocalFileSystem(), local, local)
    try:
        filesystem, path = _s3(text) if text.startswith("s3://") else pafs.FileSystem.from_uri(text)
    except (ValueError, OSError) as error:
        raise UserError(f"cannot use {text!r} as a place: {error}; give a path, s3://…, gs://… or file://…") from error
    if isinstance(filesystem, pafs.LocalFileSystem):
        return storage_path(path)
    return StoragePath(filesystem, path, text)


def _s3(uri: str) -> tuple[pafs.FileSystem, str]:
    """S3 as boto3's ordinary chain knows it: credentials, region and endpoint from environment, profile or role.

    Static credentials are handed over; those that expire (roles) are left to Arrow's own chain, which renews them.
    """
    session = boto3.Session()
    found = session.get_credentials()
    given: dict[str, str] = {}
    if found is not None and found.method in ("env", "shared-credentials-file", "config-file"):
        frozen = found.get_frozen_credentials()
        given = {"access_key": frozen.access_key, "secret_key": frozen.secret_key}
        if frozen.token:
            given["session_token"] = frozen.token
    client = session.client("s3", region_name=session.region_name or "us-east-1")
    endpoint = urlsplit(client.meta.endpoint_url)
    if not endpoint.netloc.endswith("amazonaws.com"):
        given |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
    filesystem = pafs.S3FileSystem(
        region=client.meta.region_name, allow_bucket_creation=False, connect_timeout=10, request_timeout=60, **given
    )
    return filesystem, uri.removeprefix("s3://").rstrip("/")


def retry(action: Callable[[], T], retry_seconds: float, about: str) -> T:
    """What `action` returns, tried again while storage fails, waiting longer each time. `about` names it in the log.

    Raises the last OSError once `retry_seconds` are over, and FileNotFoundError at once: waiting can't mend that.
    """
    give_up = time.monotonic() + retry_seconds
    wait = _FIRST_WAIT_SECONDS
    while True:
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as error:
            if time.monotonic() + wait > give_up:
                raise
            logger.warning("%s failed, trying again in %.0f s: %s", about, wait, first_line(error)[:200])
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)


def join(root: str, name: str) -> str:
    """`name` seen from the folder `root`; an absolute path or a URI stays what it is."""
    if "://" in name or name.startswith(("/", "~")):
        return name
    return f"{root.rstrip('/')}/{name}" if root else name


def writable(uri: str) -> StoragePath:
    """The place, after proving that it can be written. Raises UserError with the reason when it cannot."""
    root = storage_path(uri)
    probe = root / f".raylava-write-test-{uuid.uuid4().hex[:8]}"
    try:
        root.make_folder()
        probe.write_bytes(b"")
        probe.delete()
    except OSError as error:
        raise UserError(f"--storage {uri}: cannot write there ({error}); choose a folder or bucket you own") from error
    return root
