"""`raylava chat` in a terminal: mistakes and Ctrl-C lead back to the prompt, Ctrl-D and /quit end it."""

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (48, 48), (200, 30, 30)).save(tmp_path / "a red.png")
    return tmp_path / "a red.png"


# Takes the terminal, so that Ctrl-C reaches the process, also if the tests run in the background of a script, which
# ignores it. Not a preexec_fn: with one, Python forks this process, and gRPC's handlers of a fork can lose a reply that
# Ray's driver waits for, which then never learns that an actor is alive.
TAKE_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A process in a pseudo-terminal of its own, as a person at a keyboard sees it."""

    def __init__(self, *command: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self._text = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def read_until(self, expected: str, timeout_s: float = 120.0) -> str:
        """Return the output up to and with `expected`."""
        deadline = time.monotonic() + timeout_s
        while expected not in self._text:
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {expected!r} in {self._text!r}"
            self._text += os.read(self._master, 4096).decode()
        seen, _, self._text = self._text.partition(expected)
        return seen + expected

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_terminal_session_survives_mistakes_and_ctrl_c(untrained_llava: Path, image: Path) -> None:
    options = ["--max-new-tokens", "1000000"]  # an untrained model goes on until it is interrupted
    terminal = Terminal(sys.executable, "-m", "raylava.cli", "chat", str(untrained_llava), *options)
    try:
        terminal.read_until("\n> ")
        terminal.type("/image none.png\n")
        assert "/image none.png: BadRow: image missing" in terminal.read_until("\n> ")
        terminal.type(f"/image {image}\n")
        assert "error" not in terminal.read_until("\n> ")
        terminal.type("What is it?\n")
        terminal.read_until("What is it?")
        time.sleep(1)
        terminal.type("\x03")
        assert "interrupted" in terminal.read_until("\n> ")
        terminal.type("half a line\x03")
        assert "interrupted" in terminal.read_until("\n> "), "Ctrl-C at the prompt drops the line"
        terminal.type("/help\n")
        assert "/new" in terminal.read_until("\n> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()
