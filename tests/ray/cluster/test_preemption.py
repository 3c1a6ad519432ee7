"""The preemption watcher as a command, which drains the nodes of a real Ray cluster that are on its machine."""

import subprocess
import sys
import time

from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from tests.support.metadata_server import MetadataServer


def test_command_drains_every_node_of_its_machine_on_a_preemption_notice(metadata: MetadataServer) -> None:
    """The cluster is separate: this process queries its GCS and never joins it."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1).node_id for _ in range(2)]
        metadata.cloud = "gcp"
        command = ["preemption-watcher", "--address", cluster.address]
        watcher = subprocess.Popen([sys.executable, "-m", "raylava.cli", *command], stderr=subprocess.PIPE, text=True)
        assert metadata.queried.wait(30)
        assert all(is_alive(cluster.address, node) for node in nodes)
        metadata.preempted = True
        _, errors = watcher.communicate(timeout=30)
        assert watcher.returncode == 0, errors
        assert "Google Cloud preempts this instance" in errors
        deadline = time.monotonic() + 30
        while any(is_alive(cluster.address, node) for node in nodes):  # an idle node ends once drained
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        cluster.shutdown()


def is_alive(address: str, node_id: str) -> bool:
    nodes = {key.hex(): node for key, node in GcsClient(address=address).get_all_node_info().items()}
    return bool(nodes[node_id].state == GcsNodeInfo.ALIVE)
