"""Inspection of a prepared corpus: statistics, lengths, samples and the quarantine."""

import dataclasses
import json

import pytest

from raylava.artifacts import Artifact
from raylava.cli import main
from raylava.corpus.inspect import inspect_corpus, page
from raylava.corpus.shards import PrepareSpec
from raylava.models.registry import load_tokenizer
from raylava.storage import storage_path
from tests.support.corpora import prepare_serially, read_rows


@pytest.fixture(scope="module")
def spec(prepare_spec: PrepareSpec, tmp_path_factory: pytest.TempPathFactory) -> PrepareSpec:
    """A prepared corpus with a row that contains HTML, and two quarantined rows."""
    folder = tmp_path_factory.mktemp("inspected")
    rows, images = read_rows(prepare_spec)
    rows[0]["conversations"][1]["value"] = "<script>alert('x')</script>"
    rows[1]["image"] = "<b>none</b>.png"
    rows[2]["conversations"] = []
    (folder / "rows.json").write_text(json.dumps(rows))
    corpus = prepare_spec.corpus.model_copy(update={"quarantine_limit": 0.1})
    paths = ((str(folder / "rows.json"), str(images)),)
    spec = dataclasses.replace(prepare_spec, corpus=corpus, source_paths=paths, output=str(folder / "out"))
    prepare_serially(spec)
    return spec


def test_statistics_add_up(spec: PrepareSpec) -> None:
    inspection = inspect_corpus(storage_path(spec.output), sample_count=5, seed=0)
    assert sum(count for *_, count in inspection.histogram) == inspection.manifest.rows == 38
    assert inspection.quarantined_by_source == {"rows.json": {"image missing": 1, "no turns": 1}}
    assert len(inspection.samples) == 5


def test_page_is_self_contained_and_escapes_the_corpus(spec: PrepareSpec) -> None:
    text = page(
        inspect_corpus(storage_path(spec.output), sample_count=38, seed=0), "title", load_tokenizer(spec.language)
    )
    assert text.count("<article ") == text.count('src="data:image;base64,') == 38
    assert "<script" not in text
    assert "<b>none" not in text
    assert "://" not in text
    assert "default-src 'none'" in text, "and a browser would refuse to load anything"
    assert "<mark>&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&lt;end_of_turn&gt;\n</mark>" in text
    assert "image missing" in text


def test_inspect_command_rejects_artifacts_of_other_stages(
    toy_assets: Artifact, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(toy_assets.path)]) == 2
    assert "inspect shows artifacts of prepare" in capfd.readouterr().err
