"""A preparation spec over the toy assets' captions."""

import pytest

from raylava.artifacts import Artifact
from raylava.corpus.shards import PrepareSpec
from raylava.models.registry import LanguageSpec, VisionSpec
from tests.support.corpora import alignment_spec


@pytest.fixture(scope="module")
def prepare_spec(
    toy_assets: Artifact, language: LanguageSpec, vision: VisionSpec, tmp_path_factory: pytest.TempPathFactory
) -> PrepareSpec:
    return alignment_spec(toy_assets, language, vision, tmp_path_factory.mktemp("prepared"))
