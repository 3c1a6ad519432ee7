"""A sweep of many short trials whose driver is killed: the same command repeats none that is done, and loses none.

jobs/bench/sweep.py runs it, with 200 trials if asked.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "jobs" / "bench" / "sweep.py"
TRIALS = 20


@pytest.mark.parametrize("kind", [pytest.param("files", marks=pytest.mark.extended), "bucket"])
def test_no_trial_is_repeated_or_lost_when_the_driver_is_killed(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    storage = str(tmp_path) if kind == "files" else f"{request.getfixturevalue('s3')}/many-trials"
    command = [sys.executable, str(BENCH), "--trials", str(TRIALS), "--kill-at", "8", "--storage", storage, "--json"]
    command += ["--seconds", "0.1"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert 8 <= result["complete_at_kill"] < TRIALS
    assert (result["complete"], result["repeated"]) == (TRIALS, 0)
    assert result["interrupted"] <= os.cpu_count(), "at most those that were running"
    assert result["peak_mb"] < 2000
