"""A recipe or sweep as a job of a cluster: submitted once, followed, stopped, through Ray's job server.

What travels is this raylava and one validated file; what the job needs to be let in anywhere (storage, hubs, trackers)
it finds on the nodes. The job's name is the fingerprint of what it makes: the same recipe submitted twice is one job.
"""

import asyncio
import io
import json
import logging
import re
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
from raylava.config.load import load_recipe, read_mapping, read_recipe
from raylava.config.recipe import Recipe
from raylava.errors import RunError, UserError, first_line
from raylava.models.registry import is_folder
from raylava.pipeline.stages import absolute
from raylava.storage import storage_path

logger = logging.getLogger(__name__)

_SECRET_KEYS = re.compile(r"(secret|password|passwd|token|credential|access_key)[^=&]*=", re.IGNORECASE)
_STOP_SECONDS = 60.0
_FILE = "recipe.yaml"
_SWEEP = "sweep.yaml"


@dataclass(frozen=True)
class JobSpec:
    """What a job does: raylava's arguments, and the files that travel with it, by name."""

    name: str
    arguments: tuple[str, ...]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def id(self) -> str:
        """The same for the same work, whoever submits it: raylava-NAME-FINGERPRINT."""
        content = {"arguments": list(self.arguments), "files": {name: dict(file) for name, file in self.files.items()}}
        return f"raylava-{self.name}-{fingerprint('job', content)}"


def work_of(file: str, overrides: list[str], storage: str) -> JobSpec:
    """What `raylava run` or `raylava sweep` of the file would do, ready to travel.

    Raises UserError for a file that is neither, and for places in it that only this machine's working directory knows.
    """
    check_shared(storage)
    data = read_mapping(Path(file), "recipe or sweep")
    if "recipe" in data:
        return _sweep(Path(file), data, overrides, storage)
    recipe = load_recipe(file, overrides)
    if _is_bucket(storage):
        _check_places(recipe)
    else:
        recipe = absolute(recipe)
    return JobSpec(recipe.name, ("run", _FILE, "--storage", storage), {_FILE: recipe.model_dump(mode="json")})


def check_shared(storage: str) -> None:
    """Raises UserError for a storage that only this machine's working directory knows."""
    if not _is_bucket(storage) and not Path(storage).is_absolute():
        raise UserError(
            f"--storage {storage}: a job has a folder of its own; name a place that every node reaches, "
            "such as s3://BUCKET/raylava"
        )


def _is_bucket(storage: str) -> bool:
    """Then nodes need not share a disk, and places in this machine's folder mean nothing to them."""
    return "://" in storage


def _check_places(recipe: Recipe) -> None:
    """Raises UserError for a place that is relative to this machine's folder."""
    model = recipe.model
    given = {
        "data": recipe.data,
        "model.language.name": model.language.name,
        "model.vision.name": model.vision.name,
        "model.connector.weights": model.connector.weights or "",
    }
    for key, value in given.items():
        is_place = key in ("data", "model.connector.weights") or is_folder(value)
        if value and is_place and "://" not in value and not Path(value).is_absolute():
            raise UserError(
                f"{key}={value}: a place in this machine's folder, which no node has; give a bucket, "
                f"such as {key}=s3://BUCKET/{value}, or a path that every node mounts"
            )


def _sweep(file: Path, data: Mapping[str, Any], overrides: list[str], storage: str) -> JobSpec:
    from raylava.tune.sweep import load_sweep
    from raylava.tune.variants import variants

    sweep = load_sweep(str(file))
    travelling = {_SWEEP: dict(data) | {"recipe": _FILE}, _FILE: read_recipe(str(file.parent / data["recipe"]))}
    recipes = [variant.recipe for variant in variants(sweep, overrides)]
    if _is_bucket(storage):
        for recipe in recipes:
            _check_places(recipe)
    else:
        travelling[_FILE]["data"] = storage_path(str(travelling[_FILE].get("data") or ".")).uri
        travelling = {name: _absolute(content) for name, content in travelling.items()}
    return JobSpec(sweep.name, ("sweep", _SWEEP, "--storage", storage, *overrides), travelling)


def _absolute(value: Any) -> Any:
    """A sweep's settings with the folders among them by absolute path: which keys name folders depends on its axes."""
    if isinstance(value, Mapping):
        return {key: _absolute(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_absolute(one) for one in value]
    is_relative = isinstance(value, str) and "/" in value and "://" not in value and Path(value).is_dir()
    return storage_path(value).uri if is_relative else value


def check_no_secret(work: JobSpec) -> None:
    """What travels is shown to all who see the cluster. Raises UserError for a URI in it that holds a secret."""
    for where, value in _texts({"arguments": list(work.arguments)} | dict(work.files)):
        if any(_holds_secret(one) for one in (value, value.partition("=")[2])):
            raise UserError(f"{work.name}: {where} holds a password; leave it to the nodes' environment or role")


def _holds_secret(text: str) -> bool:
    try:
        uri = urlsplit(text)
        return "://" in text and bool(uri.password or _SECRET_KEYS.search(uri.query))
    except ValueError:  # not a URI at all
        return False


def _texts(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _texts(one, f"{where}.{key}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from _texts(one, f"{where}.{number}")


class JobClient:
    """A cluster's job server."""

    def __init__(self, address: str | None) -> None:
        """Raises UserError when none answers at `address` (http://…), or when it does not let us in."""
        if not address:
            raise UserError("no cluster is named; give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS")
        try:
            self._client = JobSubmissionClient(address)
        except Exception as error:  # ConnectionError, AuthenticationError, what requests raises
            raise UserError(f"--address {address}: {first_line(error)}") from error

    def submit(self, work: JobSpec) -> tuple[str, bool]:
        """The id of the job that does the work, and whether it was submitted now: one that runs is joined."""
        alive = self.alive(work)
        if alive is not None:
            return alive, False
        submission = self._next_id(work)
        try:
            self._send(work, submission)
        except RuntimeError:  # somebody was quicker, or the server's own trouble
            alive = self.alive(work)
            if alive is None:
                raise
            return alive, False
        return submission, True

    def ask(self, work: JobSpec) -> str:
        """What a job printed that nobody else follows: a question to the cluster. Raises UserError when it says no."""
        submission = self._send(work, None)
        told = io.StringIO()
        try:
            self.follow(submission, told)
        except RunError as error:
            _, is_told, reason = told.getvalue().rpartition("error: ")  # a long one goes over several lines
            raise UserError(" ".join(reason.split()) if is_told else str(error)) from error
        return told.getvalue()

    def _next_id(self, work: JobSpec) -> str:
        """An id that no earlier attempt had: Ray keeps those."""
        numbers = [int(one.submission_id.removeprefix(work.id).removeprefix("-") or 1) for one in self._attempts(work)]
        return f"{work.id}-{max(numbers) + 1}" if numbers else work.id

    def _send(self, work: JobSpec, submission: str | None) -> str:
        check_no_secret(work)
        with _folder(work) as folder:
            return str(
                self._client.submit_job(
                    entrypoint=entrypoint(work.arguments),
                    submission_id=submission,
                    runtime_env={"working_dir": str(folder)},
                    metadata={"raylava": work.arguments[0], "name": work.name},
                )
            )

    def follow(self, submission: str, out: IO[str]) -> None:
        """Copy what the job prints to `out` until it ends. Raises RunError when it did not succeed."""
        asyncio.run(self._tail(submission, out))
        info = self._client.get_job_info(submission)
        if info.status != JobStatus.SUCCEEDED:
            (why, *_) = (info.message or "no reason given").splitlines()
            raise RunError(f"job {submission} {info.status.value.lower()}: {why}")

    async def _tail(self, submission: str, out: IO[str]) -> None:
        async for lines in self._client.tail_job_logs(submission):
            out.write(lines)
            out.flush()

    def alive(self, work: JobSpec) -> str | None:
        """The job that is at the work now."""
        for job in self._attempts(work):
            if not job.status.is_terminal():
                return str(job.submission_id)
        return None

    def stop(self, work: JobSpec) -> str | None:
        """Stop the job that is at the work, and wait until it has; None when there is none.

        A training that goes on later does so from its last checkpoint.
        """
        submission = self.alive(work)
        if submission is None:
            return None
        self._client.stop_job(submission)
        deadline = time.monotonic() + _STOP_SECONDS
        while not self._client.get_job_status(submission).is_terminal():
            if time.monotonic() > deadline:
                raise RunError(f"job {submission} was told to stop and has not in {_STOP_SECONDS:.0f} s")
            time.sleep(0.2)
        return submission

    def _attempts(self, work: JobSpec) -> list[JobDetails]:
        return [job for job in self._client.list_jobs() if (job.submission_id or "").startswith(work.id)]


def entrypoint(arguments: tuple[str, ...]) -> str:
    """What the job server gives to a shell."""
    return shlex.join(("python", "-m", "raylava.cli", *arguments))


@contextmanager
def _folder(work: JobSpec) -> Iterator[Path]:
    """The working directory that travels: this raylava's sources and the work's files."""
    with tempfile.TemporaryDirectory(prefix="raylava-job-") as name:
        folder = Path(name)
        sources = Path(raylava.__file__).parent
        shutil.copytree(sources, folder / "raylava", ignore=shutil.ignore_patterns("__pycache__"))
        for file, content in work.files.items():
            (folder / file).write_text(json.dumps(content, indent=1))  # JSON is YAML
        yield folder
