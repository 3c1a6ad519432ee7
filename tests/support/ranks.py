"""Run a script as the ranks of one torch.distributed process group, without Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_ranks(script: Path, spec: dict[str, Any], world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Start `script` once per rank, with the spec and its rank as JSON; return the JSON lines that rank 0 prints.

    `folder` receives the rendezvous file and each rank's standard error, which a full pipe would block.
    """
    spec = spec | {"world_size": world_size, "rendezvous": str(folder / f"rendezvous-{os.urandom(4).hex()}")}
    errors = [folder / f"rank-{rank}.err" for rank in range(world_size)]
    processes = [_start_rank(script, spec | {"rank": rank}, errors[rank]) for rank in range(world_size)]
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error.read_text()[-3000:]
    return [json.loads(line) for line in outputs[0].splitlines() if line.startswith("{")]


def _start_rank(script: Path, spec: dict[str, Any], error: Path) -> "subprocess.Popen[str]":
    with error.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, str(script), json.dumps(spec)],
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env=os.environ | {"DS_ACCELERATOR": "cpu"},
        )
