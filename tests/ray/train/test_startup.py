"""The processes of a training stage import no more than they use."""

import subprocess
import sys

import pytest

WORKER = """
import os, sys
import raylava.compat.deepspeed
assert "deepspeed.runtime.engine" in sys.modules
for module in ("torch._inductor.compile_fx", "mlflow"):
    assert module not in sys.modules, module
assert "TORCHDYNAMO_DISABLE" not in os.environ, "torch.compile must work afterwards"
import mlflow  # the tracker's
"""
PROGRESS_MONITOR = """
import sys
import raylava.train.ray.monitor
assert not {"torch", "ray.train"} & set(sys.modules)
"""
CONTROLLER = """
import sys
import raylava.train.ray.failures, raylava.train.ray.process_group
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    "script", [WORKER, PROGRESS_MONITOR, CONTROLLER], ids=["worker", "progress monitor", "controller"]
)
def test_process_does_not_import_what_it_does_not_use(script: str) -> None:
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
