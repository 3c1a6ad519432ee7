"""Commands that only read files start without the heavy libraries."""

import subprocess
import sys
from pathlib import Path

import pytest

from raylava.artifacts import Artifact

SCRIPT = """
import sys
from raylava.cli import main
status = main(sys.argv[2:])
loaded = [name for name in sys.argv[1].split(",") if name in sys.modules]
sys.exit(f"imported {loaded}" if loaded else status)
"""
HEAVY = "torch,ray,transformers,deepspeed,optuna,plotly,boto3"


@pytest.mark.parametrize(
    ("arguments", "forbidden"),
    [
        (["--help"], HEAVY + ",pyarrow,numpy,yaml"),
        (["run", "--help"], HEAVY + ",pyarrow,numpy,yaml"),
        (["--version"], HEAVY + ",pyarrow,numpy,yaml"),
        (["recipes"], HEAVY),
        (["status", "--storage", "{storage}"], HEAVY),
        (["show", "{artifact}"], HEAVY),
        (["check", "llava-gemma-2b"], HEAVY),
    ],
    ids=["help", "help of a command", "version", "recipes", "status", "show", "check"],
)
def test_command_does_not_import(arguments: list[str], forbidden: str, toy_assets: Artifact, tmp_path: Path) -> None:
    arguments = [argument.format(storage=tmp_path, artifact=toy_assets.path) for argument in arguments]
    run = subprocess.run([sys.executable, "-c", SCRIPT, forbidden, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
