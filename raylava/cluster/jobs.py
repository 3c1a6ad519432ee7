"""A recipe or sweep as a job of a cluster: submitted once, followed, stopped, through Ray's job server.

What travels is this raylava and one validated file; what the job needs to be let in anywhere (storage, hubs, trackers)
it finds on the nodes. The job's name is the fingerprint of what it makes: the same recipe submitted twice is one job.
"""

import asyncio
import json
import logging
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import raylava
from raylava.artifacts import fingerprint
from raylava.errors import RunError, UserError, first_line
from raylava.recipe_file import load_recipe, read_mapping, read_recipe
from raylava.stages import absolute

logger = logging.getLogger(__name__)

_FILE = "recipe.yaml"
_SWEEP = "sweep.yaml"


@dataclass(frozen=True)
class Work:
    """What a job does: raylava's arguments, and the files that travel with it, by name."""

    name: str
    arguments: tuple[str, ...]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def id(self) -> str:
        """The same for the same work, whoever submits it: raylava-NAME-FINGERPRINT."""
        content = {"arguments": list(self.arguments), "files": {name: dict(file) for name, file in self.files.items()}}
        return f"raylava-{self.name}-{fingerprint('job', content)}"


def work_of(file: str, overrides: list[str], storage: str) -> Work:
    """What `raylava run` or `raylava sweep` of the file would do, ready to travel.

    Raises UserError for a file that is neither, a storage that only this machine's working directory knows, and for a
    password in the file: what travels is shown to all who see the cluster.
    """
    if "://" not in storage and not Path(storage).is_absolute():
        raise UserError(
            f"--storage {storage}: a job has a folder of its own; name a place that every node reaches, "
            "such as s3://BUCKET/raylava"
        )
    data = read_mapping(Path(file), "recipe or sweep")
    if "recipe" in data:
        work = _sweep(Path(file), data, overrides, storage)
    else:
        recipe = absolute(load_recipe(file, overrides))
        work = Work(recipe.name, ("run", _FILE, "--storage", storage), {_FILE: recipe.model_dump(mode="json")})
    for where, value in _texts({"arguments": work.arguments} | dict(work.files)):
        if urlsplit(value.partition("=")[2] or value).password or urlsplit(value).password:
            raise UserError(f"{file}: {where} holds a password; leave it to the nodes' environment or role")
    return work


def _sweep(file: Path, data: Mapping[str, Any], overrides: list[str], storage: str) -> Work:
    from raylava.tune.sweep import load_sweep

    sweep = load_sweep(str(file))
    base = read_recipe(str(file.parent / data["recipe"]))
    arguments = ("sweep", _SWEEP, "--storage", storage, *overrides)
    return Work(sweep.name, arguments, {_SWEEP: dict(data) | {"recipe": _FILE}, _FILE: base})


def _texts(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _texts(one, f"{where}.{key}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from _texts(one, f"{where}.{number}")


class Jobs:
    """A cluster's job server."""

    def __init__(self, address: str | None) -> None:
        """Raises UserError when none answers at `address` (http://…), or when it does not let us in."""
        if not address:
            raise UserError("no cluster is named; give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS")
        try:
            self._client = JobSubmissionClient(address)
        except Exception as error:  # ConnectionError, AuthenticationError, what requests raises
            raise UserError(f"--address {address}: {first_line(error)}") from error

    def submit(self, work: Work) -> tuple[str, bool]:
        """The id of the job that does the work, and whether it was submitted now: one that runs is joined."""
        alive = self.alive(work)
        if alive is not None:
            return alive, False
        attempts = len(self._attempts(work))
        submission = work.id if not attempts else f"{work.id}-{attempts + 1}"
        with _folder(work) as folder:
            self._client.submit_job(
                entrypoint=entrypoint(work.arguments),
                submission_id=submission,
                runtime_env={"working_dir": str(folder)},
                metadata={"raylava": work.arguments[0], "name": work.name},
            )
        return submission, True

    def run(self, arguments: tuple[str, ...], files: Mapping[str, Mapping[str, Any]], out: IO[str]) -> None:
        """A job that nobody else follows, such as a question to the cluster. Raises RunError when it fails."""
        with _folder(Work("ask", arguments, files)) as folder:
            submission = self._client.submit_job(
                entrypoint=entrypoint(arguments),
                runtime_env={"working_dir": str(folder)},
            )
        self.follow(submission, out)

    def follow(self, submission: str, out: IO[str]) -> None:
        """Copy what the job prints to `out` until it ends. Raises RunError when it did not succeed."""
        asyncio.run(self._tail(submission, out))
        info = self._client.get_job_info(submission)
        if info.status != JobStatus.SUCCEEDED:
            raise RunError(f"job {submission} {info.status.value.lower()}: {(info.message or '').splitlines()[:1]}")

    async def _tail(self, submission: str, out: IO[str]) -> None:
        async for lines in self._client.tail_job_logs(submission):
            out.write(lines)
            out.flush()

    def alive(self, work: Work) -> str | None:
        """The job that is at the work now."""
        for job in self._attempts(work):
            if not job.status.is_terminal():
                return str(job.submission_id)
        return None

    def stop(self, work: Work) -> str | None:
        """Ask the job that is at the work to stop; None when there is none. A training saves a checkpoint first."""
        submission = self.alive(work)
        if submission is not None:
            self._client.stop_job(submission)
        return submission

    def last(self, work: Work) -> JobDetails | None:
        """The work's newest job."""
        return max(self._attempts(work), key=lambda job: job.start_time or 0, default=None)

    def _attempts(self, work: Work) -> list[JobDetails]:
        return [job for job in self._client.list_jobs() if (job.submission_id or "").startswith(work.id)]


def entrypoint(arguments: tuple[str, ...]) -> str:
    """What the job server gives to a shell."""
    return shlex.join(("python", "-m", "raylava.cli", *arguments))


@contextmanager
def _folder(work: Work) -> Iterator[Path]:
    """The working directory that travels: this raylava's sources and the work's files."""
    with tempfile.TemporaryDirectory(prefix="raylava-job-") as name:
        folder = Path(name)
        sources = Path(raylava.__file__).parent
        shutil.copytree(sources, folder / "raylava", ignore=shutil.ignore_patterns("__pycache__"))
        for file, content in work.files.items():
            (folder / file).write_text(json.dumps(content, indent=1))  # JSON is YAML
        yield folder
