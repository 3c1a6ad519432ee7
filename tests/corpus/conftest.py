"""A preparation job over the tiny laboratory's captions."""

import pytest

from raylava.artifacts import Artifact
from raylava.corpus.prepare import Job
from raylava.model.backbones import LanguageSpec, VisionSpec
from raylava.recipe import Corpus, Model, Source, Storing


@pytest.fixture(scope="module")
def prepare_job(
    lab: Artifact,
    micro_model: Model,
    vision: VisionSpec,
    language: LanguageSpec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Job:
    source = Source(annotations="alignment.json", images="pictures")
    corpus = Corpus(sources=(source,), max_length=128, store=Storing(format="png"), rows_per_block=16)
    folder = lab.place / "corpus"
    return Job(
        "alignment",
        corpus,
        ((str(folder / "alignment.json"), str(folder / "pictures")),),
        micro_model.language,
        language.template,
        vision,
        str(tmp_path_factory.mktemp("prepared")),
    )
