"""Storage paths: local paths and URIs (s3://, gs://, any pyarrow filesystem) behind one interface.

Writes are atomic: a reader sees a complete file or none.
"""

import hashlib
import io
import logging
import os
import re
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from raylava.errors import UserError, first_line

if TYPE_CHECKING:
    import boto3

logger = logging.getLogger(__name__)

READ_BYTES = 8 << 20  # bytes of one request for a remote file that is read in parts
_FIRST_BACKOFF_S = 1.0
_MAX_BACKOFF_S = 60.0

_MAX_PATH, _MAX_NAME = 4096, 255  # bytes, on Linux and macOS alike or less
_SINGLE_SLASH = re.compile(r"(s3|gs|gcs|abfs|abfss|hdfs|file|https?):/?(?!/)")

T = TypeVar("T")


@dataclass(frozen=True)
class StoragePath:
    """A file or folder: `path` is its path within the pyarrow `filesystem`, `uri` its full name."""

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
        """Return the file's content. Raises FileNotFoundError when it does not exist."""
        with self.filesystem.open_input_stream(self.path) as stream:
            return stream.read()

    def write_bytes(self, content: bytes) -> None:
        """Replace the file atomically; a reader sees the old content or the new, never a part."""
        if not self.is_local:  # an object store makes an object visible only once it is complete
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
            _sync(target.parent)
        finally:
            part.unlink(missing_ok=True)

    def remove_partial_files(self) -> None:
        """Remove temporary files left by killed writers. Call it only when no writer is active in this folder."""
        if self.is_local:
            for part in Path(self.path).rglob(".*.part"):
                part.unlink(missing_ok=True)

    def create_exclusively(self, content: bytes) -> bool:
        """Write the file unless it exists; return whether it was written.

        Exclusive on local filesystems. Elsewhere the last of two simultaneous writers wins: the content is read back.
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
            os.link(part, target)  # atomic: a reader never sees a half-written lock
        except FileExistsError:
            return False
        finally:
            part.unlink()
        return True

    def make_folder(self) -> None:
        self.filesystem.create_dir(self.path, recursive=True)

    def delete(self) -> None:
        """Remove the file, or the folder with its content; do nothing when it does not exist."""
        kind = self.info().type
        if kind == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.path)
        elif kind == pafs.FileType.File:
            self.filesystem.delete_file(self.path)

    def children(self) -> list["StoragePath"]:
        """List the entries of this folder by name; empty when the folder does not exist.

        Local entries whose names are not UTF-8 are left out, here and in `walk_files`: nothing can refer to them.
        """
        if self.is_local:
            return [self / name for name in sorted(_entry_names(self.path))]
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        names = sorted(info.base_name for info in self.filesystem.get_file_info(selector))
        return [self / name for name in names]

    def walk_files(self) -> Iterator[tuple[str, int]]:
        """Yield (path relative to this folder, size in bytes) of every file below it, sorted by path.

        Links are followed, except to a folder that contains them; pipes, devices and broken links are left out.
        """
        if self.is_local:
            yield from sorted(_walk_local(self.path, "", frozenset()))
            return
        selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        base = self.path.rstrip("/") + "/"
        files = [info for info in self.filesystem.get_file_info(selector) if info.type == pafs.FileType.File]
        yield from sorted((info.path.removeprefix(base), info.size) for info in files)

    def open_random(self) -> "io.RawIOBase":
        """Open the file for random access; a remote one is read in requests of READ_BYTES, whatever a caller asks for.

        Raises FileNotFoundError when it does not exist.
        """
        return Path(self.path).open("rb", buffering=0) if self.is_local else _RangeReader(self)

    def sha256(self) -> str:
        """Return the hexadecimal SHA-256 of the file, read as a stream."""
        digest = hashlib.sha256()
        with self.filesystem.open_input_stream(self.path) as stream:
            while chunk := stream.read(READ_BYTES):  # pyarrow sends one request per read
                digest.update(chunk)
        return digest.hexdigest()

    def file_versions(self) -> list[tuple[str, int, str]]:
        """List (path relative to this one, size in bytes, version) of this file, or of every file below this folder.

        The version is the ETag on S3; elsewhere it is the modification time in ns.
        """
        if isinstance(self.filesystem, pafs.S3FileSystem):
            return sorted(_s3_versions(self.path))
        if self.info().type == pafs.FileType.File:
            infos = [self.info()]
        else:
            selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
            infos = [info for info in self.filesystem.get_file_info(selector) if info.type == pafs.FileType.File]
        return sorted((info.path.removeprefix(self.path), info.size, str(info.mtime_ns)) for info in infos)

    def upload_folder(self, folder: Path) -> None:
        """Copy the content of a local folder into this one; it is on disk when this returns."""
        self.make_folder()
        pafs.copy_files(
            str(folder), self.path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=self.filesystem
        )
        if self.is_local:
            for entry in folder.rglob("*"):
                _sync(Path(self.path) / entry.relative_to(folder))
            _sync(Path(self.path))

    def copy_to(self, target: Path) -> None:
        """Copy this file or folder to a local path."""
        local = pafs.LocalFileSystem()
        for name, _ in self.walk_files():  # pyarrow creates no folders for objects without folder markers
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        pafs.copy_files(self.path, str(target), source_filesystem=self.filesystem, destination_filesystem=local)


def _entry_names(folder: str) -> Iterator[str]:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from (name for name in names if not any("\udc80" <= character <= "\udcff" for character in name))


def _walk_local(folder: str, prefix: str, parents: frozenset[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """Yield (relative path, size) of the files below a folder; `parents` are the devices and inodes of those above."""
    try:
        status = os.stat(folder)
    except OSError:  # removed meanwhile
        return
    parents |= {(status.st_dev, status.st_ino)}
    for name in _entry_names(folder):
        try:
            status = os.stat(f"{folder}/{name}")
        except OSError:  # a link to nothing or to itself
            continue
        if stat.S_ISREG(status.st_mode):
            yield prefix + name, status.st_size
        elif stat.S_ISDIR(status.st_mode) and (status.st_dev, status.st_ino) not in parents:
            yield from _walk_local(f"{folder}/{name}", f"{prefix}{name}/", parents)


def _sync(path: Path) -> None:
    """Have the operating system write a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_sha256(folder: Path) -> dict[str, str]:
    """Return the hexadecimal SHA-256 of every file below a local folder by its relative path."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): storage_path(file).sha256() for file in files}


class _RangeReader(io.RawIOBase):
    """A remote file for random access, of which one range of READ_BYTES is in memory.

    The number of requests depends on the bytes that are read, not on the number of reads: the headers and members of a
    tar with small members share requests.
    """

    def __init__(self, file: StoragePath) -> None:
        super().__init__()
        self._stream = file.filesystem.open_input_file(file.path)
        self._size: int = self._stream.size()
        self._position = 0
        self._start, self._buffer = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Return `size` bytes from the position on, fewer only at the end of the file."""
        end = self._size if size is None or size < 0 else min(self._position + size, self._size)
        if not self._start <= self._position <= end <= self._start + len(self._buffer):
            self._start = self._position
            length = max(end - self._position, min(READ_BYTES, self._size - self._position))
            self._buffer = self._stream.read_at(length, self._position) if length > 0 else b""
        content = self._buffer[self._position - self._start : end - self._start] if end > self._position else b""
        self._position += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._stream.close()
        super().close()


def cache_folder() -> Path:
    """Return the folder for cached files on this node, below XDG_CACHE_HOME or ~/.cache."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "raylava"
    except RuntimeError:  # a container's user has no home
        return Path(tempfile.gettempdir()) / f"raylava-{os.getuid()}"


def storage_path(uri: str | Path) -> StoragePath:
    """Return the storage path for a local path or URI. Raises UserError for an unsupported scheme."""
    text = str(uri)
    if match := _SINGLE_SLASH.match(text):
        raise UserError(f"{text}: has one slash after {match[1]}:; did you mean {match[1]}://{text[match.end() :]}?")
    if text.rstrip("/") in ("s3:", "gs:", "gcs:"):
        raise UserError(f"{text}: names no bucket; give such as s3://BUCKET/raylava")
    if "://" not in text:
        local = _local_path(text)
        return StoragePath(pafs.LocalFileSystem(), local, local)
    try:
        filesystem, path = _s3(text) if text.startswith("s3://") else pafs.FileSystem.from_uri(text)
    except (ValueError, OSError) as error:
        raise UserError(
            f"cannot use {text!r} as a storage location: {first_line(error)}; give a path, s3://…, gs://… or file://…"
        ) from error
    if isinstance(filesystem, pafs.LocalFileSystem):
        return storage_path(path)
    return StoragePath(filesystem, path, text)


def _local_path(text: str) -> str:
    """Return an absolute path. Raises UserError for one that no file can have."""
    try:
        path = str(Path(text).expanduser().absolute())
        encoded = path.encode()  # pyarrow's paths are UTF-8
    except (RuntimeError, ValueError) as error:  # no such user; lone surrogates
        raise UserError(f"{text[:100]!r} is no path ({first_line(error)}); write it in full") from error
    too_long = len(encoded) >= _MAX_PATH or any(len(name) > _MAX_NAME for name in encoded.split(b"/"))
    if too_long or "\0" in path:
        problem = "is too long for a path" if too_long else "has a null character"
        raise UserError(f"{text[:100]!r} {problem}; name an existing file or folder")
    return path


def _s3(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return an S3 filesystem and path, with credentials, region and endpoint from boto3's default chain.

    Static credentials are passed on; expiring ones (roles) are left to Arrow's own chain, which renews them.
    """
    import boto3  # here: it takes a third of a second, which local commands need not spend

    session = boto3.Session()
    client = _s3_client(session)
    credentials = session.get_credentials()
    options: dict[str, str] = {}
    if credentials is not None and credentials.method in ("env", "shared-credentials-file", "config-file"):
        frozen = credentials.get_frozen_credentials()
        options = {"access_key": frozen.access_key, "secret_key": frozen.secret_key}
        if frozen.token:
            options["session_token"] = frozen.token
    endpoint = urlsplit(client.meta.endpoint_url)
    if not endpoint.netloc.endswith("amazonaws.com"):
        options |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
    filesystem = pafs.S3FileSystem(
        region=client.meta.region_name, allow_bucket_creation=False, connect_timeout=10, request_timeout=60, **options
    )
    return filesystem, uri.removeprefix("s3://").rstrip("/")


def _s3_client(session: "boto3.Session") -> Any:
    return session.client("s3", region_name=session.region_name or "us-east-1")


def _s3_versions(path: str) -> Iterator[tuple[str, int, str]]:
    """Yield (relative path, size, ETag) of an object, or of the objects below a prefix."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = path.partition("/")
    try:
        pages = _s3_client(boto3.Session()).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        entries = [entry for page in pages for entry in page.get("Contents", ())]
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") in ("NoSuchBucket", "404"):
            return
        raise OSError(str(error)) from error
    except BotoCoreError as error:
        raise OSError(str(error)) from error
    for entry in entries:
        name = entry["Key"].removeprefix(key)
        if (not key or name == "" or name.startswith("/")) and not name.endswith("/"):
            yield name, entry["Size"], entry["ETag"]


def retry(action: Callable[[], T], timeout_s: float, description: str) -> T:
    """Call `action` until it succeeds, with exponential backoff between failures. `description` names it in the log.

    Raises the last OSError after `timeout_s` seconds, and FileNotFoundError at once, which a retry cannot fix.
    """
    deadline = time.monotonic() + timeout_s
    wait = _FIRST_BACKOFF_S
    while True:
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as error:
            if time.monotonic() + wait > deadline:
                raise
            logger.warning("%s failed, retrying in %.0f s: %s", description, wait, first_line(error)[:200])
            time.sleep(wait)
            wait = min(2 * wait, _MAX_BACKOFF_S)


def join(root: str, name: str) -> str:
    """Join `name` to the folder `root`; an absolute path or a URI is returned unchanged."""
    if "://" in name or name.startswith(("/", "~")):
        return name
    return f"{root.rstrip('/')}/{name}" if root else name


def writable(uri: str) -> StoragePath:
    """Return the storage path after a test write. Raises UserError with the reason when it is not writable."""
    if not uri.strip():
        raise UserError("--storage is empty; name a folder or bucket you own")
    root = storage_path(uri)
    probe = root / f".raylava-write-test-{uuid.uuid4().hex[:8]}"
    try:
        root.make_folder()
        probe.write_bytes(b"")
        probe.delete()
    except OSError as error:
        raise UserError(
            f"--storage {uri}: cannot write there ({first_line(error)}); choose a folder or bucket you own"
        ) from error
    return root
