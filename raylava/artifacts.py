"""Artifacts: folders named by the fingerprint of what determines their content.

`<storage>/<stage>/<fingerprint>/` is complete once its artifact.json, which is written last, exists; no reader uses the
folder before that. This module computes fingerprints, finds, locks and commits artifacts; each stage decides what its
folder contains.
"""

import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from raylava import __version__
from raylava.errors import RunError, UserError, first_line
from raylava.local_copies import HASHES_FILE
from raylava.storage import StoragePath, folder_sha256, storage_path

logger = logging.getLogger(__name__)

RECORD_FILE = "artifact.json"
LOCK_FILE = "lock.json"
FORMAT_VERSION = 2  # increase it when the bytes that a stage writes change their meaning; it changes every fingerprint

HEARTBEAT_INTERVAL_S = 10.0
LOCK_TIMEOUT_S = 60.0  # a lock holder on another host without a heartbeat for this long is considered dead
_LOCK_POLL_INTERVAL_S = 0.5
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
_RECORD_TYPES: dict[str, Any] = {
    "stage": str,
    "fingerprint": str,
    "fingerprint_fields": dict,
    "inputs": dict,
    "metrics": dict,
    "seconds": (int, float),
    "finished": str,
}
_THREADS = 16  # that wait for storage


def fingerprint(stage: str, fields: Mapping[str, Any]) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 over stage, format version and `fields`.

    `fields` is JSON-serializable; key order does not matter. Every field must be able to change the result.
    """
    text = json.dumps({"stage": stage, "format": FORMAT_VERSION, "fields": fields}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Artifact:
    """A complete artifact. `record` is the content of its artifact.json."""

    stage: str
    fingerprint: str
    path: StoragePath
    record: dict[str, Any] = field(repr=False)

    @property
    def metrics(self) -> dict[str, Any]:
        return self.record["metrics"]


@dataclass(frozen=True)
class ArtifactSpec:
    """An artifact that may not exist yet: `fingerprint_fields` determine its content, `root` is the storage."""

    stage: str
    fingerprint_fields: dict[str, Any] = field(repr=False)
    root: StoragePath

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.stage, self.fingerprint_fields)

    @property
    def path(self) -> StoragePath:
        return self.root / self.stage / self.fingerprint

    def find(self) -> Artifact | None:
        """Return the complete artifact, or None while it has no artifact.json. Raises UserError for a damaged one."""
        try:
            return read_artifact(self.path)
        except FileNotFoundError:
            return None

    def commit(self, metrics: Mapping[str, Any], inputs: Mapping[str, str], seconds: float) -> Artifact:
        """Mark the folder as complete, and record the SHA-256 of its files.

        `inputs` maps a role (blocks, connector) to an input artifact's fingerprint.
        """
        record = {
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "format": FORMAT_VERSION,
            "raylava": __version__,
            "fingerprint_fields": self.fingerprint_fields,
            "inputs": dict(inputs),
            "metrics": dict(metrics),
            "files": _content_hashes(self.path),
            "seconds": round(seconds, 1),
            "finished": time.strftime(_TIME_FORMAT, time.gmtime()),
        }
        (self.path / RECORD_FILE).write_bytes(json.dumps(record, indent=2, ensure_ascii=False).encode())
        return Artifact(self.stage, self.fingerprint, self.path, record)


def load_artifact(path: str) -> Artifact:
    """Load the artifact in a folder. Raises UserError when there is none."""
    try:
        return read_artifact(storage_path(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{path}: not a complete artifact (no {RECORD_FILE}); `raylava run` prints the paths"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); give an artifact's folder") from error


def read_artifact(folder: StoragePath) -> Artifact:
    """Read the artifact in a folder. Raises FileNotFoundError when it is not complete, UserError when it is damaged."""
    content = (folder / RECORD_FILE).read_bytes()
    try:
        record = json.loads(content)
        for key, expected in _RECORD_TYPES.items():
            if not isinstance(record[key], expected):
                raise TypeError(f"{key} is a {type(record[key]).__name__}")
        time.strptime(record["finished"], _TIME_FORMAT)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / RECORD_FILE}: damaged ({first_line(error)}); remove the folder and build the artifact again"
        ) from error
    return Artifact(record["stage"], record["fingerprint"], folder, record)


def publish_folder(folder: Path, target: StoragePath) -> None:
    """Upload the content of a local folder into an artifact's or one below it, with the SHA-256 of each file.

    The hashes are those of the local files, so that `raylava verify` also finds what an upload has damaged.
    """
    hashes = folder_sha256(folder)
    target.upload_folder(folder)
    (target / HASHES_FILE).write_bytes(json.dumps(hashes, indent=2).encode())


def _content_hashes(folder: StoragePath) -> dict[str, str]:
    """Return the SHA-256 of the files of an artifact by path: of those that were published, and of those at its top.

    Other files below it are listed in one of these, with their hashes (blocks), or are not read again (checkpoints).
    """
    names = [name for name, _ in folder.walk_files()]
    published: dict[str, str] = {}
    for name in names:
        parent, _, base = name.rpartition("/")
        if base == HASHES_FILE:
            hashes = json.loads((folder / name).read_bytes())
            published |= {f"{parent}/{file}".lstrip("/"): digest for file, digest in hashes.items()}
    bookkeeping = (RECORD_FILE, LOCK_FILE, HASHES_FILE)
    top = [name for name in names if "/" not in name and not name.startswith((*bookkeeping, "."))]
    computed = {name: (folder / name).sha256() for name in top if name not in published}
    return dict(sorted((computed | {name: published[name] for name in names if name in published}).items()))


def damaged_files(folder: StoragePath, hashes: Mapping[str, str]) -> list[str]:
    """Return the problem of each file below `folder` that is missing or whose SHA-256 is not the recorded one."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="verify") as pool:
        problems = pool.map(lambda item: _file_problem(folder / item[0], item[1]), hashes.items())
        return [f"{name}: {problem}" for name, problem in zip(hashes, problems, strict=True) if problem]


def _file_problem(file: StoragePath, expected: str) -> str | None:
    try:
        return None if file.sha256() == expected else "its SHA-256 is not the recorded one"
    except FileNotFoundError:
        return "missing"


@contextmanager
def lock(folder: StoragePath, label: str) -> Iterator[None]:
    """Hold the exclusive lock of `folder`; wait while another run holds it, take it over when that run is dead.

    A holder on this host is alive while its process is; one on another host while its heartbeat, written every
    HEARTBEAT_INTERVAL_S seconds, is recent. `label` names the artifact in the log. Raises RunError when the lock was
    taken over meanwhile, which happens after a pause of more than LOCK_TIMEOUT_S seconds.
    """
    file = folder / LOCK_FILE
    holder = _LockHolder(file)
    waiting = False
    while not file.create_exclusively(holder.content()):
        if _take_over(file):
            continue
        if not waiting:
            logger.warning("%s is being built by another run; waiting for it", label)
            waiting = True
        time.sleep(_LOCK_POLL_INTERVAL_S)
    holder.start()
    try:
        yield
    finally:
        holder.stop()


class _LockHolder:
    """Refreshes the heartbeat of one lock file from a thread, and removes the file at the end."""

    def __init__(self, file: StoragePath) -> None:
        self._file = file
        self._process = psutil.Process()
        self._identity = f"{socket.gethostname()}:{os.getpid()}:{self._process.create_time()}:{threading.get_ident()}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="artifact-lock", daemon=True)

    def content(self) -> bytes:
        """Return the lock file's content with a heartbeat of now."""
        holder = {
            "identity": self._identity,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": self._process.create_time(),
            "heartbeat": time.time(),
        }
        return json.dumps(holder).encode()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        if not self._holds_lock():
            raise RunError(f"{self._file}: another run took over this lock; re-run the same command")
        self._file.delete()

    def _holds_lock(self) -> bool:
        try:
            return json.loads(self._file.read_bytes())["identity"] == self._identity
        except FileNotFoundError:
            return False

    def _refresh(self) -> None:
        while not self._stop.wait(HEARTBEAT_INTERVAL_S):
            if self._holds_lock():
                self._file.write_bytes(self.content())


def _take_over(file: StoragePath) -> bool:
    """Remove an abandoned lock; return True once it is gone. Of several waiting runs, one creates the marker and
    removes the lock.
    """
    try:
        holder = json.loads(file.read_bytes())
    except FileNotFoundError:
        return True  # released just now
    if not _is_abandoned(holder):
        return False
    identity = hashlib.sha256(holder["identity"].encode()).hexdigest()[:16]
    marker = StoragePath(file.filesystem, f"{file.path}.{identity}", f"{file.uri}.{identity}")
    if marker.create_exclusively(b"taken over"):
        file.delete()
    return True


def _is_abandoned(holder: dict[str, Any]) -> bool:
    if holder["host"] == socket.gethostname():
        return not _is_alive(holder["pid"], holder["started"])
    return time.time() - holder["heartbeat"] > LOCK_TIMEOUT_S


def _is_alive(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 1.0
    except psutil.NoSuchProcess:
        return False
