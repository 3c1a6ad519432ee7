"""A preparation spec over the tiny toy assets's captions."""

import pytest

from raylava.artifacts import Artifact
from raylava.config.recipe import Corpus, ImageEncoding, Model, Source
from raylava.corpus.prepare import PrepareSpec
from raylava.models.registry import LanguageSpec, VisionSpec


@pytest.fixture(scope="module")
def prepare_job(
    toy_assets: Artifact,
    toy_model: Model,
    vision: VisionSpec,
    language: LanguageSpec,
    tmp_path_factory: pytest.TempPathFactory,
) -> PrepareSpec:
    source = Source(annotations="alignment.json", images="images")
    corpus = Corpus(sources=(source,), max_length=128, image_encoding=ImageEncoding(format="png"), samples_per_block=16)
    folder = toy_assets.path / "corpus"
    return PrepareSpec(
        "alignment",
        corpus,
        ((str(folder / "alignment.json"), str(folder / "images")),),
        toy_model.language,
        language.template,
        vision,
        str(tmp_path_factory.mktemp("prepared")),
    )
