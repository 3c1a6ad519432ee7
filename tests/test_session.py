"""A command's Ray is its own unless RAY_ADDRESS names another."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = """
import ray
from ray.util.state import get_actor
from raylava.config.recipe import Resources
from raylava.cluster.session import Progress, ray_session

@ray.remote(num_cpus=0)
def seen_by_a_worker(actor):
    return get_actor(actor).state

with ray_session(Resources(workers=2)):
    assert ray.cluster_resources()["CPU"] >= 2
    progress = Progress.remote()
    ray.get(progress.count.remote())
    assert ray.get(seen_by_a_worker.remote(progress._actor_id.hex())) == "ALIVE"
"""


def test_a_cluster_that_was_killed_does_not_stand_in_the_way() -> None:
    with tempfile.TemporaryDirectory(prefix="rl") as folder:  # a short path: Ray keeps sockets below it
        trace = Path(folder) / "ray" / "ray_current_cluster"
        trace.parent.mkdir()
        trace.write_text("127.0.0.1:1")  # what a killed cluster leaves behind
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            capture_output=True,
            text=True,
            check=False,
            env=environment | {"RAY_TMPDIR": folder},
        )
    assert run.returncode == 0, run.stderr[-2000:]
