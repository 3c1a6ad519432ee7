"""An autoscaling Ray cluster on one machine: the node types of cluster/local-cluster.yaml, with processes as nodes.

Autoscaler v2 starts the nodes through node_provider.LocalNodeProvider. The dashboard listens on the loopback interface
and token authentication is enabled. Every process of the cluster carries the cluster's folder in its environment, and
only these processes are stopped.
"""

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
from ray.util import get_node_ip_address

from raylava.cluster.node_provider import (
    CLUSTER_FOLDER,
    HEAD,
    NODE_ID,
    NODE_TYPE,
    LocalNodeProvider,
    cluster_processes,
    format_labels,
)
from raylava.cluster.roles import CLUSTER_FILE, NODE_ROLES
from raylava.cluster.session import free_ports
from raylava.compat.ray import InvalidClusterConfigError, validate_cluster_config
from raylava.errors import RunError, UserError, first_line, last_line
from raylava.storage import cache_folder

VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")  # set by LocalCluster.environment
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
        return cluster_processes(self.folder)

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
    environment = _process_environment(cluster, cluster_config["head_node_type"])
    try:
        ray_start = subprocess.run(command, env=environment, capture_output=True, text=True)
        (folder / "start.log").write_text(ray_start.stdout + ray_start.stderr)
        if ray_start.returncode != 0:
            raise RunError(f"the local cluster did not start: {last_line(ray_start)}")
        _wait_until_ready(cluster)
    except BaseException:  # also KeyboardInterrupt: the caller has no handle yet to stop the cluster
        cluster.stop()
        raise
    return cluster


def _process_environment(cluster: LocalCluster, node_type: str) -> dict[str, str]:
    """Return this process's environment for the cluster's processes, without references to another cluster.

    `node_type` is that of the head; worker nodes replace it.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_JOB_ID")}
    inherited["PATH"] = f"{Path(sys.executable).parent}:{inherited.get('PATH', '')}"  # jobs run `python`
    return (
        inherited
        | cluster.environment()
        | {
            CLUSTER_FOLDER: cluster.folder,
            NODE_ROLES: "1",
            CLUSTER_FILE: f"{cluster.folder}/cluster.json",
            "RAY_enable_autoscaler_v2": "1",
            NODE_ID: HEAD,
            NODE_TYPE: node_type,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # nodes are processes, which start in seconds
        }
    )


def _complete_config(config: Path, cluster: LocalCluster) -> dict[str, Any]:
    """Return the configuration in the file, completed with the provider and defaults that `ray start` requires."""
    try:
        file_config = yaml.safe_load(config.read_text())
        head = file_config["available_node_types"][file_config["head_node_type"]]
        head["resources"].setdefault("memory", psutil.virtual_memory().total // 4)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{config}: not a valid cluster file: {type(error).__name__} {error}") from error
    defaults: dict[str, Any] = {key: [] for key in _COMMANDS} | {"file_mounts": {}, "auth": {}}  # unused by processes
    completed: dict[str, Any] = defaults | file_config | {"provider": _provider(cluster, file_config["head_node_type"])}
    try:
        validate_cluster_config(completed)
    except InvalidClusterConfigError as error:
        raise UserError(f"{config}: {first_line(error)}") from error
    return completed


def _provider(cluster: LocalCluster, head_node_type: str) -> dict[str, Any]:
    return {
        "type": "external",
        "module": f"{LocalNodeProvider.__module__}.{LocalNodeProvider.__qualname__}",
        "disable_node_updaters": True,  # a started node needs no set-up through SSH
        "disable_launch_config_check": True,
        "gcs_address": cluster.gcs,
        "head_node_type": head_node_type,
    }


def _head_labels(cluster_config: dict[str, Any]) -> str:
    labels = cluster_config["available_node_types"][cluster_config["head_node_type"]].get("labels", {})
    return format_labels(labels)


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
