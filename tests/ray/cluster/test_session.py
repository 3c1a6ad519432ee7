"""A command starts a separate Ray cluster unless RAY_ADDRESS names one to join."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = """
import ray
from ray.util.state import get_actor
from raylava.config.recipe import Resources
from raylava.cluster.session import ProgressCounter, ray_session

@ray.remote(num_cpus=0)
def state_seen_by_worker(actor_id):
    return get_actor(actor_id).state

with ray_session(Resources(workers=2)):
    assert ray.cluster_resources()["CPU"] >= 2
    progress = ProgressCounter.remote()
    ray.get(progress.count.remote())
    assert ray.get(state_seen_by_worker.remote(progress._actor_id.hex())) == "ALIVE"
"""


def test_session_starts_despite_the_address_file_of_a_killed_cluster() -> None:
    with tempfile.TemporaryDirectory(prefix="rl") as folder:  # a short path, since Ray creates Unix sockets below it
        address_file = Path(folder) / "ray" / "ray_current_cluster"
        address_file.parent.mkdir()
        address_file.write_text("127.0.0.1:1")  # as left behind by a killed cluster
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        process = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            capture_output=True,
            text=True,
            check=False,
            env=environment | {"RAY_TMPDIR": folder},
        )
    assert process.returncode == 0, process.stderr[-2000:]
