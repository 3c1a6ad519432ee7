"""Ray's node provider for a cluster on one machine: a node is what `ray start` starts, with its own temporary folder.

The autoscaler imports this module in the head's monitor process. With a shared folder, each new node would unpack the
job's files again while the driver is using them.
"""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import psutil
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

CLUSTER_FOLDER = "RAYLAVA_LOCAL_CLUSTER"  # set to the cluster's folder in the environment of all of its processes
NODE_ID = "RAY_CLOUD_INSTANCE_ID"  # in the environment of all processes of a node; the autoscaler knows nodes by it
NODE_TYPE = "RAY_NODE_TYPE_NAME"
HEAD = "head"  # the head's NODE_ID
_TERMINATION_TIMEOUT_S = 5.0


def cluster_processes(folder: str) -> Iterator[psutil.Process]:
    """Yield the processes of the cluster in `folder`, including those of jobs."""
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(CLUSTER_FOLDER) == folder:
                yield process


def node_processes(node_id: str, folder: str) -> Iterator[psutil.Process]:
    """Yield the processes of one node of the cluster in `folder`."""
    for process in cluster_processes(folder):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(NODE_ID) == node_id:
                yield process


def format_labels(labels: Mapping[str, str]) -> str:
    """Return node labels as `ray start --labels` expects them."""
    return ",".join(f"{key}={value}" for key, value in labels.items())


class LocalNodeProvider(NodeProvider):
    """Starts and stops worker nodes as processes; see Ray's NodeProvider for the methods.

    `provider_config` holds the `gcs_address` and the head's node type, `head_node_type`.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._folder = os.environ[CLUSTER_FOLDER]
        self._tags = {
            HEAD: {
                TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
                TAG_RAY_USER_NODE_TYPE: provider_config["head_node_type"],
                TAG_RAY_NODE_NAME: HEAD,
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            }
        }

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration unchanged."""
        return cluster_config

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """List the nodes that have all of these tags."""
        return [node for node, tags in list(self._tags.items()) if tag_filters.items() <= tags.items()]

    def is_running(self, node_id: str) -> bool:
        """Return whether the node has been started and not been terminated."""
        return node_id in self._tags

    def is_terminated(self, node_id: str) -> bool:
        """Return whether the node has been terminated."""
        return node_id not in self._tags

    def node_tags(self, node_id: str) -> dict[str, str]:
        """Return the node's tags; those of a node terminated meanwhile are empty."""
        return self._tags.get(node_id, {})

    def external_ip(self, node_id: str) -> str:
        """Return the node's name: all nodes share one address, and nothing connects to it."""
        return node_id

    def internal_ip(self, node_id: str) -> str:
        """Return the node's name; see `external_ip`."""
        return node_id

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        """Start `count` nodes at once. Raises RuntimeError with Ray's output for those that do not start.

        A node is listed before it starts: the autoscaler would take one that it finds in Ray first for a surplus node.
        """
        node_type = tags[TAG_RAY_USER_NODE_TYPE]
        starting = {}
        for _ in range(count):
            node = f"{node_type}-{uuid.uuid4().hex[:8]}"
            self._tags[node] = {**tags, TAG_RAY_NODE_NAME: node, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
            starting[node] = self._ray_start(node, node_type, resources, labels)
        failures = []
        for node, command in starting.items():
            output, _ = command.communicate()
            if command.returncode != 0:
                self.terminate_node(node)
                failures.append(output.strip())
        if failures:
            raise RuntimeError(f"{len(failures)} of {count} nodes did not start: {failures[0]}")

    def _ray_start(
        self, node: str, node_type: str, resources: dict[str, float], labels: dict[str, str]
    ) -> "subprocess.Popen[str]":
        """Start the node's processes; the command ends once they run."""
        custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU", "memory")}
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={self.provider_config['gcs_address']}"),
            *(f"--num-cpus={resources.get('CPU', 0):.0f}", f"--num-gpus={resources.get('GPU', 0):.0f}"),
            *(f"--resources={json.dumps(custom)}", f"--labels={format_labels(labels)}"),
            *(f"--temp-dir={self._folder}/{node[-8:]}", "--dashboard-agent-listen-port=0", "--disable-usage-stats"),
            *("--min-worker-port=0", "--max-worker-port=0"),
        ]
        if "memory" in resources:
            command.append(f"--memory={resources['memory']:.0f}")
        environment = os.environ | {NODE_ID: node, NODE_TYPE: node_type}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, close_fds=True
        )

    def terminate_node(self, node_id: str) -> None:
        """Stop the node's processes: by SIGTERM, and by SIGKILL those that still run after five seconds."""
        self._tags.pop(node_id, None)
        processes = list(node_processes(node_id, self._folder))
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=_TERMINATION_TIMEOUT_S)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
