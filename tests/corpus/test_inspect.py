"""An inspection shows what went in: figures, lengths, samples as the model sees them, and the quarantine."""

import dataclasses
import json
from pathlib import Path

import pytest

from raylava.artifacts import Artifact
from raylava.cli import main
from raylava.console import NullProgressBar
from raylava.corpus.inspect import inspect, page
from raylava.corpus.prepare import PrepareSpec, prepare
from raylava.models.registry import load_tokenizer
from raylava.storage import storage_path


@pytest.fixture(scope="module")
def spec(prepare_job: PrepareSpec, tmp_path_factory: pytest.TempPathFactory) -> PrepareSpec:
    """A corpus with a row that tries to write into the page, and two that are set aside."""
    folder = tmp_path_factory.mktemp("inspected")
    annotations, images = prepare_job.places[0]
    rows = json.loads(Path(annotations).read_text())
    rows[0]["conversations"][1]["value"] = "<script>alert('x')</script>"
    rows[1]["image"] = "<b>none</b>.png"
    rows[2]["conversations"] = []
    (folder / "rows.json").write_text(json.dumps(rows))
    corpus = prepare_job.corpus.model_copy(update={"quarantine_limit": 0.1})
    places = ((str(folder / "rows.json"), images),)
    made = dataclasses.replace(prepare_job, corpus=corpus, places=places, output=str(folder / "out"))
    prepare(made, "tokenizer", NullProgressBar())
    return made


def test_figures_add_up(spec: PrepareSpec) -> None:
    found = inspect(storage_path(spec.output), samples=5, seed=0)
    assert sum(count for *_, count in found.histogram) == found.manifest.rows == 38
    assert found.quarantined_by_source == {"rows.json": {"image missing": 1, "no turns": 1}}
    assert len(found.shown) == 5


def test_the_page_is_self_contained_and_escapes_what_a_corpus_says(spec: PrepareSpec) -> None:
    text = page(inspect(storage_path(spec.output), samples=38, seed=0), "title", load_tokenizer(spec.language))
    assert text.count("<article>") == text.count('src="data:image;base64,') == 38
    assert "<script" not in text
    assert "<b>none" not in text
    assert "http" not in text
    assert "<mark>&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&lt;end_of_turn&gt;\n</mark>" in text
    assert "image missing" in text


def test_the_command_refuses_an_artifact_of_another_stage(
    toy_assets: Artifact, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(toy_assets.path)]) == 2
    assert "shows those of prepare" in capfd.readouterr().err
