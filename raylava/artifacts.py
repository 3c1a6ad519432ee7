"""An artifact: a folder whose name is the fingerprint of what decides its content.

`<storage>/<stage>/<fingerprint>/` is complete when its artifact.json, written last, is there; until then nobody reads
it. Here: fingerprint, find, lock, commit. What a stage puts in the folder is the stage's business.
"""

import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from raylava import __version__
from raylava.errors import RunError, UserError
from raylava.storage import StoragePath, storage_path

logger = logging.getLogger(__name__)

RECORD = "artifact.json"
LOCK = "lock.json"
FORMAT_VERSION = 1  # raise it when the bytes a stage writes change their meaning: every fingerprint changes with it

HEARTBEAT_SECONDS = 10.0
STALE_AFTER_SECONDS = 60.0  # a holder on another host that has not been heard of for so long is gone


def fingerprint(stage: str, content: Mapping[str, Any]) -> str:
    """SHA-256 (16 of its 64 hexadecimal digits) over stage, format and all that decides the result.

    `content` is JSON-able; key order does not matter. Nothing that leaves the result as it is may be in it.
    """
    text = json.dumps({"stage": stage, "format": FORMAT_VERSION, "content": content}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Artifact:
    """A complete artifact. `record` is what artifact.json holds."""

    stage: str
    fingerprint: str
    path: StoragePath
    record: dict[str, Any] = field(repr=False)

    @property
    def metrics(self) -> dict[str, Any]:
        return self.record["metrics"]


@dataclass(frozen=True)
class ArtifactSpec:
    """An artifact that may not be complete yet: where it will be and what decides it."""

    stage: str
    content: dict[str, Any] = field(repr=False)
    root: StoragePath

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.stage, self.content)

    @property
    def path(self) -> StoragePath:
        return self.root / self.stage / self.fingerprint

    def find(self) -> Artifact | None:
        """The finished artifact, or None while it has no artifact.json."""
        try:
            record = json.loads((self.path / RECORD).read_bytes())
        except FileNotFoundError:
            return None
        return Artifact(self.stage, self.fingerprint, self.path, record)

    def commit(self, metrics: Mapping[str, Any], inputs: Mapping[str, str], seconds: float) -> Artifact:
        """Declare the folder complete. `inputs` maps a role to the fingerprint of the artifact that played it."""
        record = {
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "format": FORMAT_VERSION,
            "raylava": __version__,
            "content": self.content,
            "inputs": dict(inputs),
            "metrics": dict(metrics),
            "seconds": round(seconds, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        (self.path / RECORD).write_bytes(json.dumps(record, indent=2, ensure_ascii=False).encode())
        return Artifact(self.stage, self.fingerprint, self.path, record)


def load(path: str) -> Artifact:
    """The artifact in a folder, for `raylava show`. Raises UserError when the folder holds none."""
    folder = storage_path(path)
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no finished artifact there (no {RECORD}); `raylava run` prints the paths") from error
    return Artifact(record["stage"], record["fingerprint"], folder, record)


@contextmanager
def lock(folder: StoragePath, announce: str) -> Iterator[None]:
    """Hold `folder` for one builder at a time: waits while another builds, takes over when that one is gone.

    A holder proves that it lives by its process on the same host, or by a heart-beat every HEARTBEAT_SECONDS elsewhere.
    Raises RunError when a lost lock is noticed (the holder was paused for longer than STALE_AFTER_SECONDS).
    """
    file = folder / LOCK
    holder = _Holder(file)
    waited = False
    while not file.create_exclusively(holder.ticket()):
        if _take_over(file):
            continue
        if not waited:
            logger.warning("%s is being built by another run; waiting for it", announce)
            waited = True
        time.sleep(0.5)
    holder.start()
    try:
        yield
    finally:
        holder.stop()


class _Holder:
    """Keeps one lock file fresh from a thread, and removes it at the end."""

    def __init__(self, file: StoragePath) -> None:
        self._file = file
        self._process = psutil.Process()
        self._identity = f"{socket.gethostname()}:{os.getpid()}:{self._process.create_time()}:{threading.get_ident()}"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="artifact-lock", daemon=True)

    def ticket(self) -> bytes:
        about = {
            "identity": self._identity,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": self._process.create_time(),
            "heartbeat": time.time(),
        }
        return json.dumps(about).encode()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        if not self._is_mine():
            raise RunError(f"{self._file}: another run took this lock over; run the command again")
        self._file.delete()

    def _is_mine(self) -> bool:
        try:
            return json.loads(self._file.read_bytes())["identity"] == self._identity
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        while not self._stopping.wait(HEARTBEAT_SECONDS):
            if self._is_mine():
                self._file.write_bytes(self.ticket())


def _take_over(file: StoragePath) -> bool:
    """Remove an abandoned lock; True when it is gone. Of several that wait, one creates the marker and removes it."""
    try:
        about = json.loads(file.read_bytes())
    except FileNotFoundError:
        return True  # released just now
    if not _abandoned(about):
        return False
    identity = hashlib.sha256(about["identity"].encode()).hexdigest()[:16]
    marker = StoragePath(file.filesystem, f"{file.path}.{identity}", f"{file.uri}.{identity}")
    if marker.create_exclusively(b"taken over"):
        file.delete()
    return True


def _abandoned(about: dict[str, Any]) -> bool:
    if about["host"] == socket.gethostname():
        return not _alive(about["pid"], about["started"])
    return time.time() - about["heartbeat"] > STALE_AFTER_SECONDS


def _alive(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 1.0
    except psutil.NoSuchProcess:
        return False
