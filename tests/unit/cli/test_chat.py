"""`raylava chat` reads questions from a pipe, or answers one; only answers go to standard output."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from transformers.utils import logging as progress

from raylava.cli import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_loading_bar() -> Iterator[None]:
    """In the process of the tests, the bar of transformers does not go to the log file, where a command sends it."""
    progress.disable_progress_bar()
    yield
    progress.enable_progress_bar()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (48, 48), (200, 30, 30)).save(tmp_path / "a red.png")
    return tmp_path / "a red.png"


def chat(
    capfd: Captured, monkeypatch: pytest.MonkeyPatch, lines: bytes | None, *arguments: object
) -> tuple[int, str, str]:
    """Run `raylava chat` with `lines` on a standard input that is no terminal; None closes it."""
    stdin = None if lines is None else io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    status = main(["chat", *map(str, arguments), "--max-new-tokens", "3"])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def test_each_line_of_a_pipe_is_a_question_and_each_answer_one_line(
    untrained_llava: Path, image: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = chat(capfd, monkeypatch, b"What is it?\n\nAre you sure?\n", untrained_llava, "--image", image)
    assert (status, err) == (0, "")
    assert out.count("\n") == 2
    _, alone, _ = chat(capfd, monkeypatch, None, untrained_llava, "What is it?", "--image", image)
    assert " ".join(alone.splitlines()) == out.split("\n")[0], "the first answer is that of one question"


def test_json_is_the_whole_conversation_in_one_object(
    untrained_llava: Path, image: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = f"Which?\n/image {image}\nAnd this?\n/new\nHello\n/quit\nnever asked\n".encode()
    options = ["--image", image, "--image", image, "--json"]
    status, out, err = chat(capfd, monkeypatch, lines, untrained_llava, *options)
    assert (status, err) == (0, "")
    first, second = json.loads(out)["conversations"]
    assert [(turn["question"], turn["images"]) for turn in first] == [
        ("Which?", [str(image)] * 2),
        ("And this?", [str(image)]),
    ]
    assert [(turn["question"], turn["images"]) for turn in second] == [("Hello", [])]
    assert all(isinstance(turn["answer"], str) for turn in (*first, *second))


MISTAKES = {
    "an image that does not exist": (b"/image none.png\nWhat?\n", [], "standard input, line 1: /image none.png: "),
    "an unknown command": (b"Hello\n/picture\n", [], "standard input, line 2: /picture: unknown command; choose one"),
    "a text in another encoding": ("schön\n".encode("latin-1"), [], "standard input is not utf-8 text"),
    "an --image that does not exist": (b"What?\n", ["--image", "none.png"], "--image none.png: "),
    "no standard input": (None, [], "no QUESTION, and standard input is closed; give a QUESTION"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_a_pipe_is_one_line_and_status_2(
    mistake: str, untrained_llava: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, options, message = MISTAKES[mistake]
    status, _, err = chat(capfd, monkeypatch, lines, untrained_llava, *options)
    assert (status, err.count("\n")) == (2, 1), err
    assert message in err


def test_one_question_may_have_several_images_and_a_bad_one_is_status_2(
    untrained_llava: Path, image: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = ["--image", image, "--image", image]
    status, out, err = chat(capfd, monkeypatch, b"", untrained_llava, "Which?", *two, "--json")
    assert (status, err) == (0, "")
    assert list(json.loads(out)) == ["question", "answer"]
    status, out, err = chat(capfd, monkeypatch, b"", untrained_llava, "Which?", *two, "--image", "none.png")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "--image none.png" in err
