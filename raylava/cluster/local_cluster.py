"""An autoscaling Ray cluster on one machine: the node types of cluster/local-cluster.yaml, with processes as nodes.

Ray's fake multi-node provider starts the nodes for autoscaler v2. The dashboard listens on the loopback interface and
token authentication is enabled. Every process of the cluster carries the cluster's folder in its environment, and only
these processes are stopped.
"""

import copy
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.ray_constants import LABELS_ENVIRONMENT_VARIABLE, RESOURCES_ENVIRONMENT_VARIABLE
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)
from ray.util import get_node_ip_address

from raylava.cluster.roles import CLUSTER_FILE, NODE_ROLES
from raylava.cluster.session import free_ports
from raylava.errors import RunError, UserError, first_line
from raylava.storage import cache_folder

VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")  # set by LocalCluster.environment
_CLUSTER_FOLDER = "RAYLAVA_LOCAL_CLUSTER"  # set to the cluster's folder in the environment of all of its processes
_START_TIMEOUT_S = 60.0
_KILL_ATTEMPTS = 10
_COMMANDS = (
    "cluster_synced_files",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


class LocalNodeProvider(FakeMultiNodeProvider):
    """Ray's fake multi-node provider with a separate temporary folder for each node.

    With a shared folder, each new node would unpack the job's files again while the driver is using them. Ray's
    `provider.type: fake_multinode` cannot be used instead, since it needs files that Ray's wheel does not contain.
    """

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], count: int, resources: dict[str, float], labels: dict[str, str]
    ) -> None:
        custom_resources = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
        with self.lock:
            node_id = self._next_hex_node_id()
            node_type = tags[TAG_RAY_USER_NODE_TYPE]
            parameters = RayParams(
                temp_dir=f"{os.environ[_CLUSTER_FOLDER]}/{node_id[-3:]}",
                min_worker_port=0,
                max_worker_port=0,
                dashboard_port=None,
                dashboard_agent_listen_port=0,
                num_cpus=resources.get("CPU", 0),
                num_gpus=resources.get("GPU", 0),
                resources=custom_resources,
                labels=labels,
                redis_address=self._gcs_address,
                gcs_address=self._gcs_address,
                env_vars={
                    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_id,
                    "RAY_CLOUD_INSTANCE_ID": node_id,
                    "RAY_NODE_TYPE_NAME": node_type,
                    RESOURCES_ENVIRONMENT_VARIABLE: json.dumps(custom_resources),
                    LABELS_ENVIRONMENT_VARIABLE: json.dumps(labels),
                },
            )
            node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
            default_tags = {
                TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
                TAG_RAY_USER_NODE_TYPE: node_type,
                TAG_RAY_NODE_NAME: node_id,
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            }
            self._nodes[node_id] = {"tags": default_tags | tags, "node": node}


@dataclass(frozen=True)
class LocalCluster:
    """A started cluster. `folder` holds its token, its configuration and Ray's files."""

    folder: str
    address: str  # http://HOST:PORT of the dashboard and job server
    gcs: str  # HOST:PORT of the GCS

    def environment(self) -> dict[str, str]:
        """Return the environment variables that let raylava and `ray job` find the cluster and authenticate."""
        return dict(zip(VARIABLES, (self.address, "token", f"{self.folder}/auth_token"), strict=True))

    def is_ready(self) -> bool:
        """Return whether the job server accepts connections."""
        host, port = self.address.removeprefix("http://").split(":")
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return True
        return False

    def processes(self) -> Iterator[psutil.Process]:
        """Yield the cluster's processes, including those of jobs."""
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(_CLUSTER_FOLDER) == self.folder:
                    yield process

    def stop(self) -> None:
        """Kill the cluster's processes, and no others, and remove its folder."""
        for _ in range(_KILL_ATTEMPTS):  # a process may start another one between listing and killing
            processes = list(self.processes())
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=10)
            if not processes:
                break
        shutil.rmtree(self.folder, ignore_errors=True)


def start(config: Path) -> LocalCluster:
    """Start the cluster that a configuration file describes, and return it once its job server answers.

    Raises UserError if the file is invalid, RunError if the cluster does not start.
    """
    folder = Path(tempfile.mkdtemp(prefix="raylava-"))  # a short path, since it contains Unix sockets
    gcs_port, dashboard_port, client_port = free_ports(3)
    cluster = LocalCluster(str(folder), f"http://127.0.0.1:{dashboard_port}", f"{get_node_ip_address()}:{gcs_port}")
    cluster_config = _complete_config(config, cluster)
    (folder / "cluster.json").write_text(json.dumps(cluster_config))
    token = folder / "auth_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"),
        *(f"--port={gcs_port}", f"--temp-dir={folder}/ray"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}", "--dashboard-agent-listen-port=0"),
        *("--num-cpus=0", f"--ray-client-server-port={client_port}", "--min-worker-port=0", "--max-worker-port=0"),
        *(f"--labels={_head_labels(cluster_config)}", f"--autoscaling-config={folder}/cluster.json"),
    ]
    try:
        ray_start = subprocess.run(command, env=_process_environment(cluster), capture_output=True, text=True)
        (folder / "start.log").write_text(ray_start.stdout + ray_start.stderr)
        if ray_start.returncode != 0:
            last_line = (ray_start.stderr.strip() or ray_start.stdout.strip()).splitlines()[-1:]
            raise RunError(f"the local cluster did not start: {' '.join(last_line)}")
        _wait_until_ready(cluster)
    except BaseException:  # also KeyboardInterrupt: the caller has no handle yet to stop the cluster
        cluster.stop()
        raise
    return cluster


def _process_environment(cluster: LocalCluster) -> dict[str, str]:
    """Return this process's environment for the cluster's processes, without references to another cluster."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_JOB_ID")}
    inherited["PATH"] = f"{Path(sys.executable).parent}:{inherited.get('PATH', '')}"  # jobs run `python`
    return (
        inherited
        | cluster.environment()
        | {
            _CLUSTER_FOLDER: cluster.folder,
            NODE_ROLES: "1",
            CLUSTER_FILE: f"{cluster.folder}/cluster.json",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # nodes are processes, which start in seconds
        }
    )


def _complete_config(config: Path, cluster: LocalCluster) -> dict[str, Any]:
    """Return the configuration in the file, completed with the provider and defaults that `ray start` requires."""
    try:
        file_config = yaml.safe_load(config.read_text())
        types = dict(file_config["available_node_types"])
        head = types.pop(file_config["head_node_type"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{config}: not a valid cluster file: {type(error).__name__} {error}") from error
    head["resources"].setdefault("memory", psutil.virtual_memory().total // 4)
    types[FAKE_HEAD_NODE_TYPE] = head  # Ray's provider expects this name for the head
    defaults: dict[str, Any] = {key: [] for key in _COMMANDS} | {"file_mounts": {}, "auth": {}}  # unused by processes
    completed: dict[str, Any] = (
        defaults
        | file_config
        | {"provider": _provider(cluster), "available_node_types": types, "head_node_type": FAKE_HEAD_NODE_TYPE}
    )
    try:
        validate_config(prepare_config(copy.deepcopy(completed)))
    except Exception as error:  # jsonschema.ValidationError, ValueError, KeyError and others
        raise UserError(f"{config}: {first_line(error)}") from error
    return completed


def _provider(cluster: LocalCluster) -> dict[str, Any]:
    return {
        "type": "external",
        "module": f"{LocalNodeProvider.__module__}.{LocalNodeProvider.__qualname__}",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "gcs_address": cluster.gcs,
    }


def _head_labels(cluster_config: dict[str, Any]) -> str:
    labels = cluster_config["available_node_types"][cluster_config["head_node_type"]].get("labels", {})
    return ",".join(f"{key}={value}" for key, value in labels.items())


def _wait_until_ready(cluster: LocalCluster) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not cluster.is_ready():
        if time.monotonic() > deadline:
            raise RunError(f"the job server of the local cluster did not answer at {cluster.address}")
        time.sleep(0.2)


def up(config: Path) -> LocalCluster:
    """Return the running local cluster, or start one after removing the remains of a dead one."""
    cluster = _recorded_cluster()
    if cluster is not None and cluster.is_ready():
        return cluster
    down()
    cluster = start(config)
    _record(cluster)
    return cluster


def down() -> bool:
    """Stop the local cluster; return False if none of its processes was running."""
    cluster = _recorded_cluster()
    was_running = cluster is not None and any(cluster.processes())
    if cluster is not None:
        cluster.stop()
    _record_file().unlink(missing_ok=True)
    return was_running


def _recorded_cluster() -> LocalCluster | None:
    """Return the cluster that `up` started last, whether or not it still runs, or None."""
    try:
        return LocalCluster(**json.loads(_record_file().read_text()))
    except FileNotFoundError:
        return None


def _record(cluster: LocalCluster) -> None:
    _record_file().parent.mkdir(parents=True, exist_ok=True)
    _record_file().write_text(json.dumps(asdict(cluster)))


def _record_file() -> Path:
    return cache_folder() / "local_cluster.json"
