"""Commands that only read files start without the heavy libraries."""

import subprocess
import sys
from pathlib import Path

import pytest

from raylava.artifacts import Artifact
from raylava.toy.demo import recipes_folder

SCRIPT = """
import sys
from raylava.cli import main
status = main(sys.argv[2:])
loaded = [name for name in sys.argv[1].split(",") if name in sys.modules]
sys.exit(f"imported {loaded}" if loaded else status)
"""
RECIPE = str(recipes_folder() / "llava-gemma-2b.yaml")


@pytest.mark.parametrize(
    ("arguments", "forbidden"),
    [
        (["--help"], "torch,ray,transformers"),
        (["status", "--storage", "{storage}"], "torch,ray,transformers"),
        (["show", "{artifact}"], "torch,ray,transformers"),
        (["check", RECIPE], "torch,transformers"),
    ],
    ids=["help", "status", "show", "check"],
)
def test_command_does_not_import(arguments: list[str], forbidden: str, toy_assets: Artifact, tmp_path: Path) -> None:
    arguments = [argument.format(storage=tmp_path, artifact=toy_assets.path) for argument in arguments]
    run = subprocess.run([sys.executable, "-c", SCRIPT, forbidden, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
