"""The torchrun backend in a process without Ray; tests/ray/pipeline/test_end_to_end.py compares its weights."""

import subprocess
import sys

SCRIPT = """
import sys
import raylava.train.torchrun_backend
assert not [name for name in sys.modules if name.split('.')[0] == 'ray']
"""


def test_torchrun_backend_does_not_import_ray() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
