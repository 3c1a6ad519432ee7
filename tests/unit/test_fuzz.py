"""Mutated recipes, corpora, answers, questions, manifests: every reader returns a result or raises a UserError.

`RAYLAVA_FUZZ_EXAMPLES=5000 pytest tests/unit/test_fuzz.py` searches longer.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylava.artifacts import Artifact, load_artifact
from raylava.config.load import load_recipe
from raylava.config.recipe import Benchmark
from raylava.corpus.blocks import read_manifest
from raylava.errors import UserError
from raylava.evaluation.answer_files import read_predictions
from raylava.evaluation.loading import read_grades
from raylava.evaluation.questions import Question, read_questions
from raylava.models.registry import LanguageSpec, VisionSpec
from raylava.perf.hardware import read_prices
from raylava.storage import storage_path
from raylava.toy.demo import recipes_folder
from raylava.tune.sweep import load_sweep
from tests.support.corpora import alignment_spec, prepare_serially, read_rows, with_settings

LONGER = os.environ.get("RAYLAVA_FUZZ_EXAMPLES")
EXAMPLES = int(LONGER or "60")
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
# The same examples in every run of the suite; new ones in a longer search.
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=SLOW, derandomize=LONGER is None)

ODD_TEXTS = ("", " ", "\ud800", "\0", "../x", "x" * 300, "[bold]")
ODD_VALUES = st.sampled_from([None, True, -1, 0, 2**70, 1e300, float("nan"), *ODD_TEXTS, [], {}, [[]], [None]])
ODD_BYTES = (b"", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 2000, b"9" * 5000)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all parts of a JSON value."""
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a JSON value with another part at a path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def without(value: Any, path: tuple[Any, ...]) -> Any:
    """Return a JSON value without the part at a path."""
    if not path:
        return None
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = without(copy[path[0]], path[1:])
    return copy


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """Return a JSON value with up to three parts replaced by odd ones or removed."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        value = without(value, path) if draw(st.booleans()) else replaced(value, path, draw(ODD_VALUES))
    return value


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return a file's content with a piece cut out, inserted or repeated."""
    start = draw(st.integers(0, len(content)))
    stop = draw(st.integers(start, min(len(content), start + 40)))
    inserted = draw(st.binary(max_size=6) | st.sampled_from(ODD_BYTES))
    return content[:start] + inserted + content[stop:]


def expect_result_or_user_error(read: Callable[[], Any]) -> None:
    """Call a reader; any exception but a UserError, whose message is one line, fails the test."""
    with suppress(UserError):
        try:
            read()
        except UserError as error:
            if "\n" in str(error):
                pytest.fail(f"not one line: {error}")
            raise


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def write(folder: Path, name: str, data: st.DataObject, value: Any, dump: Callable[[Any], str] = json.dumps) -> Path:
    """Write a mutated value, or the damaged text of the value, to a file of a new folder."""
    new = Path(tempfile.mkdtemp(dir=folder))
    file = new / name
    if data.draw(st.booleans()):
        file.write_bytes(data.draw(damaged(dump(value).encode())))
    else:
        file.write_bytes(dump(data.draw(mutated(value))).encode(errors="surrogatepass"))
    return file


RECIPE = yaml.safe_load((recipes_folder() / "toy.yaml").read_text())
SWEEP = yaml.safe_load((recipes_folder() / "toy-ablations.yaml").read_text())


@given(st.data())
@FUZZ
def test_recipes(folder: Path, data: st.DataObject) -> None:
    file = write(folder, "recipe.yaml", data, RECIPE, yaml.safe_dump)
    expect_result_or_user_error(lambda: load_recipe(str(file), []))


@given(st.data())
@FUZZ
def test_sweeps_and_price_tables(folder: Path, data: st.DataObject) -> None:
    file = write(folder, "sweep.yaml", data, SWEEP, yaml.safe_dump)
    expect_result_or_user_error(lambda: load_sweep(str(file)))
    prices = write(folder, "prices.yaml", data, {"h100x8": 60.0, "cpux2": 0.1}, yaml.safe_dump)
    expect_result_or_user_error(lambda: read_prices(str(prices)))


REFERENCES = ["yes", {"answer": "no"}]
QUESTION = {"question_id": "q", "image": "a.png", "text": "Is it?", "answers": REFERENCES, "category": "c"}
TURNS = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
ROW = {"id": "q", "image": "a.png", "conversations": TURNS}
QUESTION_FILES = {"questions.jsonl": QUESTION, "questions.json": [ROW]}


@pytest.mark.parametrize("name", QUESTION_FILES)
@given(st.data())
@FUZZ
def test_questions(name: str, folder: Path, data: st.DataObject) -> None:
    file = write(folder, name, data, QUESTION_FILES[name])
    benchmark = Benchmark(name="b", questions=str(file), include=("*.png",), categories={"all": "."})
    expect_result_or_user_error(lambda: read_questions(storage_path(file), benchmark))


@given(st.data())
@FUZZ
def test_answers_and_grades(folder: Path, data: st.DataObject) -> None:
    answers = [{"question_id": "q", "prompt": "p", "text": "yes", "metadata": {"problem": "p"}}]
    file = write(folder, "answers.json", data, data.draw(st.sampled_from([answers, answers[0], {"q": "yes"}])))
    expect_result_or_user_error(lambda: read_predictions(storage_path(file)))
    grades = write(folder, "grades.json", data, {"q": {"score": [1, 2]}, "r": 3})
    questions = [Question(name, None, "x", "all", ("y",)) for name in "qr"]
    expect_result_or_user_error(lambda: read_grades(storage_path(grades), questions))


MANIFEST = {
    "schema_version": 1,
    "tokenizer": "t",
    "pixels": {},
    "blocks": [{"path": "b", "rows": 1, "quarantined": 0, "truncated": 0, "bytes": 3, "sha256": "s"}],
    "rows_in": 1,
    "rows": 1,
    "tokens": 1,
    "loss_tokens": 1,
    "images": 1,
    "truncated": 0,
    "quarantined": 0,
    "quarantine": {},
}


@given(st.data())
@FUZZ
def test_manifests_and_artifact_records(folder: Path, data: st.DataObject) -> None:
    manifest = write(folder, "manifest.json", data, MANIFEST)
    expect_result_or_user_error(lambda: read_manifest(storage_path(manifest.parent)))
    record = {"stage": "prepare", "fingerprint": "f", "metrics": {"rows": 1}, "inputs": {}, "seconds": 1.0}
    artifact = write(folder, "artifact.json", data, record)
    expect_result_or_user_error(lambda: load_artifact(str(artifact.parent)))


@given(st.data())
@FUZZ
def test_corpora(
    toy_assets: Artifact, language: LanguageSpec, vision: VisionSpec, folder: Path, data: st.DataObject
) -> None:
    prepare_spec = alignment_spec(toy_assets, language, vision, folder)
    rows, images = read_rows(prepare_spec)
    corpus = write(folder, "alignment.json", data, rows[:3]).parent
    (corpus / "images").symlink_to(images)
    spec = with_settings(prepare_spec, corpus / "out", corpus, quarantine_limit=1.0)
    expect_result_or_user_error(lambda: prepare_serially(spec))
