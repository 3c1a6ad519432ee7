"""What tests do to the processes that they start."""

import subprocess

import psutil


def kill_with_children(run: "subprocess.Popen[str]") -> None:
    """SIGKILL a process and all that it started, and reap it."""
    for process in [*psutil.Process(run.pid).children(recursive=True), psutil.Process(run.pid)]:
        process.kill()
    run.communicate()
