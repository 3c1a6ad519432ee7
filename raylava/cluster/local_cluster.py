"""An autoscaling cluster on one machine: cluster/laptop.yaml's node types, nodes that are processes, autoscaler v2.

Ray's own fake multi-node provider starts the nodes. The dashboard is on loopback, token authentication is on, and what
is stopped is what was started here: each of its processes carries the cluster's folder in its environment.
"""

import copy
import json
import logging
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

logger = logging.getLogger(__name__)

VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")  # what `environment` sets
_MARK = "RAYLAVA_LAPTOP"  # in the environment of every process of the cluster: its folder
_START_SECONDS = 60.0
_COMMANDS = (
    "cluster_synced_files",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


class Provider(FakeMultiNodeProvider):
    """Ray's fake multi-node provider (what its `provider.type: fake_multinode` wants is not in Ray's wheel), with a
    folder for each node: in one folder, each new node unpacks the job's files anew under the feet of the driver.
    """

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], count: int, resources: dict[str, float], labels: dict[str, str]
    ) -> None:
        custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
        with self.lock:
            name = self._next_hex_node_id()
            kind = tags[TAG_RAY_USER_NODE_TYPE]
            parameters = RayParams(
                temp_dir=f"{os.environ[_MARK]}/{name[-3:]}",
                min_worker_port=0,
                max_worker_port=0,
                dashboard_port=None,
                dashboard_agent_listen_port=0,
                num_cpus=resources.get("CPU", 0),
                num_gpus=resources.get("GPU", 0),
                resources=custom,
                labels=labels,
                redis_address=self._gcs_address,
                gcs_address=self._gcs_address,
                env_vars={
                    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": name,
                    "RAY_CLOUD_INSTANCE_ID": name,
                    "RAY_NODE_TYPE_NAME": kind,
                    RESOURCES_ENVIRONMENT_VARIABLE: json.dumps(custom),
                    LABELS_ENVIRONMENT_VARIABLE: json.dumps(labels),
                },
            )
            node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
            about = {
                TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
                TAG_RAY_USER_NODE_TYPE: kind,
                TAG_RAY_NODE_NAME: name,
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            }
            self._nodes[name] = {"tags": about | tags, "node": node}


@dataclass(frozen=True)
class LocalCluster:
    """A cluster that was started. `folder` holds its token, its configuration and Ray's own files."""

    folder: str
    address: str  # http, of the dashboard and job server
    gcs: str

    def environment(self) -> dict[str, str]:
        """What a shell wants set so that raylava and `ray job` find the cluster and are let in."""
        return dict(zip(VARIABLES, (self.address, "token", f"{self.folder}/auth_token"), strict=True))

    def answers(self) -> bool:
        """Whether its job server does."""
        host, port = self.address.removeprefix("http://").split(":")
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return True
        return False

    def processes(self) -> Iterator[psutil.Process]:
        """The cluster's processes, jobs included."""
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(_MARK) == self.folder:
                    yield process

    def stop(self) -> None:
        """Kill what was started and remove its folder. Nothing else on the machine is touched."""
        for _ in range(10):  # a process may be starting another while we look
            found = list(self.processes())
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(found, timeout=10)
            if not found:
                break
        shutil.rmtree(self.folder, ignore_errors=True)


def start(config: Path) -> LocalCluster:
    """A cluster as the file describes it; returns once its job server answers.

    Raises UserError for a file that is none, RunError when it does not start.
    """
    folder = Path(tempfile.mkdtemp(prefix="raylava-"))  # short: sockets lie below it
    gcs_port, dashboard_port, client_port = free_ports(3)
    laptop = LocalCluster(str(folder), f"http://127.0.0.1:{dashboard_port}", f"{get_node_ip_address()}:{gcs_port}")
    described = _completed(config, laptop)
    (folder / "cluster.json").write_text(json.dumps(described))
    token = folder / "auth_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"),
        *(f"--port={gcs_port}", f"--temp-dir={folder}/ray"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}", "--dashboard-agent-listen-port=0"),
        *("--num-cpus=0", f"--ray-client-server-port={client_port}", "--min-worker-port=0", "--max-worker-port=0"),
        *(f"--labels={_labels(described)}", f"--autoscaling-config={folder}/cluster.json"),
    ]
    try:
        started = subprocess.run(command, env=_environment(laptop), capture_output=True, text=True)
        (folder / "start.log").write_text(started.stdout + started.stderr)
        if started.returncode != 0:
            told = (started.stderr.strip() or started.stdout.strip()).splitlines()[-1:]
            raise RunError(f"the laptop cluster did not start: {' '.join(told)}")
        _await(laptop)
    except BaseException:  # Ctrl-C too: nobody else would know of it
        laptop.stop()
        raise
    return laptop


def _environment(laptop: LocalCluster) -> dict[str, str]:
    """This process's, without what would lead the new cluster's processes to another one."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_JOB_ID")}
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept.get('PATH', '')}"  # jobs say `python`
    return (
        kept
        | laptop.environment()
        | {
            _MARK: laptop.folder,
            NODE_ROLES: "1",
            CLUSTER_FILE: f"{laptop.folder}/cluster.json",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # a node is a process here: there in seconds, or lost
        }
    )


def _completed(config: Path, laptop: LocalCluster) -> dict[str, Any]:
    try:
        described = yaml.safe_load(config.read_text())
        types = dict(described["available_node_types"])
        head = types.pop(described["head_node_type"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{config}: not a cluster's file: {type(error).__name__} {error}") from error
    head["resources"].setdefault("memory", psutil.virtual_memory().total // 4)
    provider = {
        "type": "external",
        "module": f"{Provider.__module__}.{Provider.__qualname__}",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "gcs_address": laptop.gcs,
    }
    defaults: dict[str, Any] = {key: [] for key in _COMMANDS} | {
        "file_mounts": {},
        "auth": {},
    }  # nodes that are processes want none
    types[FAKE_HEAD_NODE_TYPE] = head  # Ray's provider knows the head by this name
    completed: dict[str, Any] = (
        defaults
        | described
        | {"provider": provider, "available_node_types": types, "head_node_type": FAKE_HEAD_NODE_TYPE}
    )
    try:
        validate_config(prepare_config(copy.deepcopy(completed)))
    except Exception as error:  # of many kinds: jsonschema's, ValueError, KeyError
        raise UserError(f"{config}: {first_line(error)}") from error
    return completed


def _labels(described: dict[str, Any]) -> str:
    labels = described["available_node_types"][described["head_node_type"]].get("labels", {})
    return ",".join(f"{key}={value}" for key, value in labels.items())


def _await(laptop: LocalCluster) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not laptop.answers():
        if time.monotonic() > deadline:
            raise RunError(f"the laptop cluster's job server did not answer at {laptop.address}")
        time.sleep(0.2)


def up(config: Path) -> LocalCluster:
    """The laptop cluster that runs, or a new one in place of one that is dead."""
    laptop = _last()
    if laptop is not None and laptop.answers():
        return laptop
    down()
    return _kept(start(config))


def down() -> bool:
    """Stop what is left of the laptop cluster; False when nothing is."""
    laptop = _last()
    found = laptop is not None and any(laptop.processes())
    if laptop is not None:
        laptop.stop()
    _file().unlink(missing_ok=True)
    return found


def _last() -> LocalCluster | None:
    """The one that `up` started, alive or not."""
    try:
        return LocalCluster(**json.loads(_file().read_text()))
    except FileNotFoundError:
        return None


def _kept(laptop: LocalCluster) -> LocalCluster:
    _file().parent.mkdir(parents=True, exist_ok=True)
    _file().write_text(json.dumps(asdict(laptop)))
    return laptop


def _file() -> Path:
    return cache_folder() / "laptop.json"
