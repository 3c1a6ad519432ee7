"""A command's Ray is its own unless RAY_ADDRESS names another."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = """
import ray
from raylava.recipe import Resources
from raylava.session import ray_session
with ray_session(Resources(workers=2)):
    assert ray.cluster_resources()["CPU"] >= 2
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
