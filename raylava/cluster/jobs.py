"""Submit, follow and stop jobs through Ray's job server.

A job receives raylava's sources and its validated recipe or sweep. Credentials for storage, hubs and trackers do not
travel: the job finds them on the nodes. The id of a job is derived from its content, so that submitting the same recipe
twice yields one job.
"""

import asyncio
import io
import json
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import raylava
from raylava.artifacts import fingerprint
from raylava.errors import SECRET_NAMES, RunError, UserError, first_line, redact_urls

_STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class JobSpec:
    """A job: the arguments of the raylava command, and the content of the files in its working directory by name."""

    name: str
    arguments: tuple[str, ...]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def id(self) -> str:
        """The id raylava-NAME-FINGERPRINT, which depends only on the job's name and content."""
        content = {"arguments": list(self.arguments), "files": {name: dict(file) for name, file in self.files.items()}}
        return f"raylava-{self.name}-{fingerprint('job', content)}"


def validate_shared_storage(storage: str) -> None:
    """Raise UserError if the storage is a relative path, which a job's working directory would resolve differently."""
    if not is_uri(storage) and not Path(storage).is_absolute():
        raise UserError(
            f"--storage {storage}: a job runs in its own working directory; use a location that every node can reach, "
            "such as s3://BUCKET/raylava"
        )


def is_uri(location: str) -> bool:
    """Return whether the location is a URI, such as a bucket, and not a local path."""
    return "://" in location


def check_no_secret(spec: JobSpec) -> None:
    """Raise UserError if an argument or file contains a URI with a secret: everyone with cluster access can read them.

    The error names the argument or key, not the secret.
    """
    for key, text in _strings({"arguments": list(spec.arguments)} | dict(spec.files)):
        if any(_contains_secret(candidate) for candidate in (text, text.partition("=")[2])):
            raise UserError(
                f"{spec.name}: {key} contains a password or secret; remove it and provide it through the nodes' "
                "environment or role"
            )


def _contains_secret(text: str) -> bool:
    try:
        uri = urlsplit(text)
        return "://" in text and (redact_urls(text) != text or bool(SECRET_NAMES.search(uri.query)))
    except ValueError:  # not a URI
        return False


def _strings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted path and the text of every string in nested mappings and sequences."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(item, f"{path}.{key}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _strings(item, f"{path}.{index}")


class JobClient:
    """Client of a cluster's job server."""

    def __init__(self, address: str | None) -> None:
        """Connect to the job server at `address` (http://HOST:PORT).

        Raises UserError if there is no address, if no server answers or if authentication fails.
        """
        if not address:
            raise UserError("no cluster address; give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS")
        try:
            self._client = JobSubmissionClient(address)
        except Exception as error:  # ConnectionError, AuthenticationError and errors of requests
            raise UserError(f"--address {address}: {first_line(error)}") from error

    def submit(self, spec: JobSpec) -> tuple[str, bool]:
        """Submit the job unless it is running; return its submission id and whether it was submitted now."""
        running = self.running_job(spec)
        if running is not None:
            return running, False
        submission_id = self._next_id(spec)
        try:
            self._send(spec, submission_id)
        except RuntimeError:  # the id was taken by a simultaneous submission, or the server failed
            running = self.running_job(spec)
            if running is None:
                raise
            return running, False
        return submission_id, True

    def run_and_capture(self, spec: JobSpec) -> str:
        """Run a job to its end and return its output. Raises UserError with the job's error message if it fails."""
        submission_id = self._send(spec, None)
        output = io.StringIO()
        try:
            self.follow(submission_id, output)
        except RunError as error:
            _, separator, reason = output.getvalue().rpartition("error: ")  # a long message spans several lines
            raise UserError(" ".join(reason.split()) if separator else str(error)) from error
        return output.getvalue()

    def _next_id(self, spec: JobSpec) -> str:
        """Return a submission id that no earlier attempt used, since Ray rejects used ids."""
        attempts = [job.submission_id.removeprefix(spec.id).removeprefix("-") for job in self._attempts(spec)]
        numbers = [int(suffix or 1) for suffix in attempts]
        return f"{spec.id}-{max(numbers) + 1}" if numbers else spec.id

    def _send(self, spec: JobSpec, submission_id: str | None) -> str:
        check_no_secret(spec)
        with _working_directory(spec) as folder:
            return str(
                self._client.submit_job(
                    entrypoint=entrypoint(spec.arguments),
                    submission_id=submission_id,
                    runtime_env={"working_dir": str(folder)},
                    metadata={"raylava": spec.arguments[0], "name": spec.name},
                )
            )

    def follow(self, submission_id: str, out: IO[str]) -> None:
        """Copy the job's output to `out` until the job ends. Raises RunError if the job does not succeed."""
        asyncio.run(self._tail(submission_id, out))
        info = self._client.get_job_info(submission_id)
        if info.status != JobStatus.SUCCEEDED:
            (reason, *_) = (info.message or "no reason given").splitlines()
            raise RunError(f"job {submission_id} {info.status.value.lower()}: {reason}")

    async def _tail(self, submission_id: str, out: IO[str]) -> None:
        async for lines in self._client.tail_job_logs(submission_id):
            out.write(lines)
            out.flush()

    def running_job(self, spec: JobSpec) -> str | None:
        """Return the submission id of the job if it is pending or running, else None."""
        for job in self._attempts(spec):
            if not job.status.is_terminal():
                return str(job.submission_id)
        return None

    def stop(self, spec: JobSpec) -> str | None:
        """Stop the job and wait for its end; return its submission id, or None if it is not running.

        A stopped training can be resumed from its last checkpoint by submitting it again. Raises RunError if the job
        does not stop in time.
        """
        submission_id = self.running_job(spec)
        if submission_id is None:
            return None
        self._client.stop_job(submission_id)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while not self._client.get_job_status(submission_id).is_terminal():
            if time.monotonic() > deadline:
                raise RunError(f"job {submission_id} did not stop within {_STOP_TIMEOUT_S:.0f} s")
            time.sleep(0.2)
        return submission_id

    def _attempts(self, spec: JobSpec) -> list[JobDetails]:
        return [job for job in self._client.list_jobs() if (job.submission_id or "").startswith(spec.id)]


def entrypoint(arguments: tuple[str, ...]) -> str:
    """Return the shell command that the job server runs, with the arguments quoted."""
    return shlex.join(("python", "-m", "raylava.cli", *arguments))


@contextmanager
def _working_directory(spec: JobSpec) -> Iterator[Path]:
    """Provide the job's working directory: raylava's sources and the files of the spec."""
    with tempfile.TemporaryDirectory(prefix="raylava-job-") as name:
        folder = Path(name)
        sources = Path(raylava.__file__).parent
        shutil.copytree(sources, folder / "raylava", ignore=shutil.ignore_patterns("__pycache__"))
        for file, content in spec.files.items():
            (folder / file).write_text(json.dumps(content, indent=1))  # JSON is valid YAML
        yield folder
