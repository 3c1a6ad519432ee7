"""Prepares a corpus in a separate process with its own Ray cluster, which a test may kill."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

from raylava.corpus.shards import PrepareSpec

_SCRIPT = """
import pickle, sys
import ray
from raylava.corpus.prepare import prepare
from raylava.progress import NullProgressBar
spec = pickle.loads(bytes.fromhex(sys.argv[1]))
cluster = None
if sys.argv[2] == "growing":
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address, log_to_driver=False)
else:
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)

class AddNode(NullProgressBar):
    "A progress bar that adds a node to the cluster once rows are done."
    def update(self, done, total, **metrics):
        global cluster
        if done and cluster is not None:
            cluster, growing = None, cluster
            growing.add_node(num_cpus=1)

prepare(spec, "tokenizer", AddNode())
ray.shutdown()
"""


def environment_without_ray() -> dict[str, str]:
    """Return the environment without the address of the session's Ray cluster."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def start_prepare(spec: PrepareSpec, growing: bool = False) -> "subprocess.Popen[bytes]":
    """Start preparing on a local Ray instance, or on a node that a second one joins after the first block."""
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, pickle.dumps(spec).hex(), "growing" if growing else "local"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment_without_ray(),
    )


def wait_for_records(folder: Path, process: "subprocess.Popen[bytes]", count: int = 5) -> None:
    """Wait until `count` blocks are complete. Fails when the process ends before."""
    deadline = time.monotonic() + 120
    while len(list(folder.glob("record-*.json"))) < count:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
