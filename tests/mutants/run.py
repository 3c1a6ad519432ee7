"""Break the lines that carry raylava's promises, one at a time, and check that a named test notices each.

    python -m tests.mutants.run [--only TEXT] [--jobs N]      (`make mutants`)

A mutant replaces one line of the sources in a copy of the working tree; its test must then fail within a minute, and
must pass on the sources as they are. Results are kept in .mutants.json by the content of the mutant, of the sources and
of the tests, so that an interrupted run continues where it stopped. Exit status 1 if any mutant survives.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

import psutil

from tests.mutants.catalog import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / ".mutants.json"
COPIED = ("raylava", "tests", "jobs", "cluster", "docs", "pyproject.toml")
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """`verdict` is killed, survived, slow (no result within a minute) or invalid (the line is not there once)."""

    verdict: str
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="mutants whose promise or file contains this text")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    selected = [mutant for mutant in MUTANTS if arguments.only in f"{mutant.promise} {mutant.file}"]
    outcomes = Results()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda mutant: outcomes.of(mutant), selected))
    broken = _failing_tests({mutant.test for mutant in selected})
    for mutant, outcome in zip(selected, results, strict=True):
        verdict = "test fails anyway" if mutant.test in broken else outcome.verdict
        sys.stdout.write(f"{verdict:<9} {outcome.seconds:5.1f} s  {mutant.promise}  ({mutant.test})\n")
    killed = sum(
        outcome.verdict == "killed" and mutant.test not in broken
        for mutant, outcome in zip(selected, results, strict=True)
    )
    sys.stdout.write(f"{killed} of {len(selected)} mutants killed\n")
    return 0 if killed == len(selected) else 1


class Results:
    """The outcomes so far, in a file."""

    def __init__(self) -> None:
        self._lock, self._sources = Lock(), _tree_hash()
        self._outcomes = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def of(self, mutant: Mutant) -> Outcome:
        """Return the mutant's outcome, from the file if it is there."""
        key = hashlib.sha256(json.dumps([asdict(mutant), self._sources]).encode()).hexdigest()[:16]
        if key not in self._outcomes:
            outcome = _run(mutant)
            sys.stderr.write(f"{outcome.verdict}: {mutant.promise}\n")
            with self._lock:
                self._outcomes[key] = asdict(outcome)
                RESULTS.write_text(json.dumps(self._outcomes))
        return Outcome(**self._outcomes[key])


def _tree_hash() -> str:
    """Return a hash of all sources and tests."""
    digest = hashlib.sha256()
    for folder in ("raylava", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)}".encode() + file.read_bytes())
    return digest.hexdigest()


def _run(mutant: Mutant) -> Outcome:
    """Run the mutant's test on a copy of the tree in which its line is replaced."""
    with tempfile.TemporaryDirectory(prefix="raylava-mutant-") as name:
        folder = Path(name)
        _copy_tree(folder)
        file = folder / mutant.file
        source = file.read_text()
        if source.count(mutant.line) != 1:
            return Outcome("invalid", 0.0)
        file.write_text(source.replace(mutant.line, mutant.replacement))
        started = time.monotonic()
        process = _start_pytest(folder, ["-x", mutant.test])
        try:
            process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _kill_tree(process.pid)
            process.communicate()
            return Outcome("slow", TIMEOUT_S)
        # Status 1 is a failed test; others mean that the test could not run.
        verdict = {0: "survived", 1: "killed"}.get(process.returncode, "invalid")
        return Outcome(verdict, round(time.monotonic() - started, 1))


def _kill_tree(pid: int) -> None:
    """Kill a process and its children, such as a Ray cluster's."""
    process = psutil.Process(pid)
    for member in (*process.children(recursive=True), process):
        with suppress(psutil.NoSuchProcess):
            member.kill()


def _copy_tree(folder: Path) -> None:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)


def _failing_tests(tests: set[str]) -> set[str]:
    """Return the tests that fail on the sources as they are."""
    process = _start_pytest(ROOT, ["-rfE", "-n", "2", "--dist", "loadfile", *sorted(tests)])
    report, _ = process.communicate()
    return {test for test in tests if f"FAILED {test}" in report or f"ERROR {test}" in report}


def _start_pytest(folder: Path, arguments: list[str]) -> "subprocess.Popen[str]":
    """Start pytest in the folder, whose sources come before those that are installed."""
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


if __name__ == "__main__":
    sys.exit(main())
