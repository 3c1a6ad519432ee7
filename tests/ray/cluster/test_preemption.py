"""The preemption watcher as a command, which drains a node of a real Ray cluster."""

import subprocess
import sys
import time

from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from tests.support.metadata_server import MetadataServer


def test_command_drains_its_node_on_a_preemption_notice(metadata: MetadataServer) -> None:
    """The cluster is separate: this process queries its GCS and never joins it."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        metadata.cloud = "gcp"
        command = ["preemption-watcher", "--address", cluster.address, "--node-id", node.node_id]
        watcher = subprocess.Popen([sys.executable, "-m", "raylava.cli", *command], stderr=subprocess.PIPE, text=True)
        assert metadata.queried.wait(30)
        assert is_alive(cluster.address, node.node_id)
        metadata.preempted = True
        _, errors = watcher.communicate(timeout=30)
        assert watcher.returncode == 0, errors
        assert "Google Cloud preempts this instance" in errors
        deadline = time.monotonic() + 30
        while is_alive(cluster.address, node.node_id):  # an idle node ends once drained
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        cluster.shutdown()


def is_alive(address: str, node_id: str) -> bool:
    nodes = {key.hex(): node for key, node in GcsClient(address=address).get_all_node_info().items()}
    return bool(nodes[node_id].state == GcsNodeInfo.ALIVE)
