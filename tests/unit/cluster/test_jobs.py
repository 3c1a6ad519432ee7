"""Job submission: quoting of the command, rejection of secrets, and errors of the connection."""

import re
import shlex
from typing import Any

import pytest

from raylava.cli import main
from raylava.cli.job_specs import job_spec_for
from raylava.cluster.jobs import JobClient, check_no_secret, entrypoint
from raylava.errors import UserError
from raylava.toy.demo import recipes_folder

RECIPE = str(recipes_folder() / "llava-gemma-2b.yaml")
STORAGE = "s3://bucket/raylava"
DATA = "data=s3://bucket/data"


@pytest.mark.parametrize(
    ("overrides", "storage", "key"),
    [
        (["tracking.mlflow=postgresql://me:planted@host/db"], STORAGE, "recipe.yaml.tracking.mlflow"),
        (["tracking.mlflow=https://host/?api_token=planted"], STORAGE, "recipe.yaml.tracking.mlflow"),
        ([], "s3://key:planted@bucket/raylava", "arguments.3"),
        (["tracking.mlflow=https://planted@host/x"], STORAGE, "recipe.yaml.tracking.mlflow"),
        (["tracking.mlflow=https://host/x?X-Amz-Signature=planted"], STORAGE, "recipe.yaml.tracking.mlflow"),
        ([], "s3://bucket/raylava?access_key=AK&secret_key=planted", "arguments.3"),
    ],
)
def test_job_with_a_secret_is_rejected_without_repeating_the_secret(
    overrides: list[str], storage: str, key: str
) -> None:
    with pytest.raises(UserError, match=f"{re.escape(key)} contains a password") as error:
        check_no_secret(job_spec_for(RECIPE, [DATA, *overrides], storage))
    assert "planted" not in str(error.value)
    check_no_secret(job_spec_for(RECIPE, [DATA, "name=name"], STORAGE))


class JobServer:
    """The job server's client: no job exists, and what is submitted is recorded."""

    def __init__(self, address: str) -> None:
        self.submitted: list[dict[str, Any]] = []

    def list_jobs(self) -> list[Any]:
        return []

    def submit_job(self, **job: Any) -> str:
        self.submitted.append(job)
        return str(job["submission_id"])


def test_job_with_a_secret_is_never_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    servers: list[JobServer] = []
    monkeypatch.setattr(
        "raylava.cluster.jobs.JobSubmissionClient", lambda address: servers.append(JobServer(address)) or servers[-1]
    )
    client = JobClient("http://127.0.0.1:8265")
    with pytest.raises(UserError, match="contains a password"):
        client.submit(job_spec_for(RECIPE, [DATA, "tracking.mlflow=postgresql://me:planted@host/db"], STORAGE))
    assert servers[0].submitted == []
    client.submit(job_spec_for(RECIPE, [DATA], STORAGE))
    assert len(servers[0].submitted) == 1


def test_entrypoint_quotes_arguments_for_the_shell() -> None:
    spec = job_spec_for(str(recipes_folder() / "ablations.yaml"), ["data=$(touch owned)"], "/a place/of; mine")
    assert shlex.split(entrypoint(spec.arguments))[3:] == list(spec.arguments)


def test_missing_or_unreachable_job_server_is_reported(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert main(["submit", RECIPE, DATA, "--storage", STORAGE]) == 2
    assert "no cluster address; give --address" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(UserError, match=r"--address http://127\.0\.0\.1:1: "):
        JobClient("http://127.0.0.1:1")
