"""The commands of the quickstart and of the page about data formats run as written, on a small corpus.

The files are those that a reader makes: the README's recipe, and the JSON, YAML and Python blocks of the pages. What
differs from the pages is in this module: CHANGES of the recipe, values of the words in capitals, and commands that are
NOT_RUN, each with its reason.
"""

import io
import itertools
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image

from raylava.artifacts import Artifact
from raylava.cli import main
from raylava.toy.demo import recipes_folder

ROOT = Path(__file__).parents[2]
PAGES = ("quickstart.md", "data-formats.md")
NOT_RUN = {
    "make install": "the tests run in an environment that it has made",
    "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make install": "the same, from another package index",
    "source .venv/bin/activate": "a command of the shell",
    "make demo": "takes minutes; tests/ray/pipeline/test_end_to_end.py runs the same stages on tiny assets",
    "raylava demo pretrain.enabled=false": "takes minutes, as `make demo`",
}
# The README's recipe is for models of the hub and GPUs; here it trains the toy backbones for a step, on a CPU.
CHANGES = {
    "extends": str(recipes_folder() / "toy.yaml"),
    "data": "mine",
    "pretrain": {"max_steps": 1},
    "finetune": {"max_steps": 1},
    "resources": {"workers": 1},
}
BACKBONES = {"language": "gemma", "vision": "clip"}
STAGES = ("finetune", "prepare")
REDIRECTIONS = ("<", ">")
QUESTIONS = "What is it?\nAre you sure?\n"


def blocks(page: Path, language: str) -> list[str]:
    """Return the blocks of a page in one language. Indented blocks are commands, as in `sh`."""
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    return [
        token.content
        for token in tokens
        if (token.type == "fence" and token.info == language) or (token.type == "code_block" and language == "sh")
    ]


def block_named(page: Path, language: str, name: str) -> str:
    """Return the block whose first line is a comment with the name of its file."""
    return next(block for block in blocks(page, language) if block.startswith(f"# {name}\n"))


def commands() -> list[str]:
    """Return the commands of the pages in their order, each once, without comments."""
    lines = [line for page in PAGES for block in blocks(ROOT / "docs" / page, "sh") for line in block.split("\n")]
    texts = [re.sub(r"\s+# .*", "", line).strip() for line in lines]
    return list(dict.fromkeys(text for text in texts if text))


@pytest.fixture(scope="module")
def folder(toy_assets: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of a reader, with a corpus in `mine/` and all files that the pages show or name."""
    folder = tmp_path_factory.mktemp("reader")
    write_corpus(Path((toy_assets.path / "corpus").path), folder / "mine")
    shutil.copytree(folder / "mine" / "images", folder / "images")
    shutil.copy(folder / "mine" / "questions.jsonl", folder)
    (folder / "questions.txt").write_text(QUESTIONS)
    recipe = yaml.safe_load(block_named(ROOT / "README.md", "yaml", "my.yaml"))
    backbones = {name: {"name": str(toy_assets.path / "backbones" / family)} for name, family in BACKBONES.items()}
    (folder / "my.yaml").write_text(yaml.safe_dump(recipe | CHANGES | {"model": backbones}))
    formats = ROOT / "docs" / "data-formats.md"
    (folder / "filtered.yaml").write_text(block_named(formats, "yaml", "filtered.yaml"))
    (folder / "my_filters.py").write_text(block_named(formats, "python", "my_filters.py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def write_corpus(toy_corpus: Path, target: Path) -> None:
    """Write the toy corpus under the names of the README's recipe, with the row and the question of the page first."""
    row, question = (json.loads(block) for block in blocks(ROOT / "docs" / "data-formats.md", "json"))
    shutil.copytree(toy_corpus / "images", target / "images")
    image = target / "images" / row["image"]
    image.parent.mkdir()
    Image.new("RGB", (48, 48), (90, 60, 30)).save(image)
    for name, toy_name in (("captions.json", "alignment.json"), ("conversations.json", "instruction.json")):
        (target / name).write_text(json.dumps([row, *json.loads((toy_corpus / toy_name).read_text())]))
    (target / "questions.jsonl").write_text(json.dumps(question) + "\n" + (toy_corpus / "questions.jsonl").read_text())


def run(command: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command of raylava as a shell would, in this process; return its status and errors."""
    words = shlex.split(command)
    arguments = list(itertools.takewhile(lambda word: word not in REDIRECTIONS, words[1:]))
    files = {sign: Path(words[words.index(sign) + 1]) for sign in REDIRECTIONS if sign in words}
    with pytest.MonkeyPatch.context() as patch:
        lines = files["<"].read_bytes() if "<" in files else b""
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        capfd.readouterr()
        status = main(arguments)
    captured = capfd.readouterr()
    if ">" in files:
        files[">"].write_text(captured.out)
    return status, captured.err


@pytest.fixture(scope="module")
def words(ray_cluster: None, folder: Path) -> dict[str, str]:
    """What the words in capitals stand for: artifacts of `raylava run my.yaml`, and an image."""
    assert main(["run", "my.yaml"]) == 0
    (model,), (corpus, *_) = ([str(path) for path in Path("raylava-storage").glob(f"{stage}/*/")] for stage in STAGES)
    return {"MODEL": model, "ARTIFACT": corpus, "FILE": "images/a/b.jpg"}


@pytest.mark.parametrize("command", [command for command in commands() if command not in NOT_RUN])
def test_command_of_a_page_runs_as_written(
    command: str, words: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert command.startswith("raylava "), "a command that this test does not know: run it here, or list it"
    status, err = run(re.sub("|".join(words), lambda word: words[word[0]], command), capfd)
    assert status == 0, err
    if "< questions.txt" in command:
        assert len(Path("answers.txt").read_text().splitlines()) == len(QUESTIONS.splitlines())


def test_every_command_that_is_not_run_is_on_a_page() -> None:
    assert set(NOT_RUN) <= set(commands())


def test_row_and_question_of_the_page_are_used(words: dict[str, str]) -> None:
    for corpus in Path("raylava-storage").glob("prepare/*"):
        assert json.loads((corpus / "manifest.json").read_text())["quarantined"] == 0
    first = [
        json.loads(file.read_text().splitlines()[0]) for file in Path("raylava-storage").glob("*/*/questions.jsonl")
    ]
    assert {(question["question_id"], question["image"]) for question in first} == {("1", "a/b.jpg")}
