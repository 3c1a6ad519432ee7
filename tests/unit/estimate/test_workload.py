"""Corpus sizes: read from a prepared corpus, or assumed to be like LLaVA's."""

import numpy as np
import pytest

from raylava.artifacts import Artifact
from raylava.config.load import load_recipe
from raylava.corpus.blocks import Blocks
from raylava.errors import UserError
from raylava.estimate.workload import assumed_corpus, prepared_corpus
from raylava.storage import storage_path
from raylava.toy.demo import recipes_folder


def test_assumed_lengths_are_like_llavas_and_within_the_recipes_max_length() -> None:
    instruction = load_recipe(str(recipes_folder() / "llava-gemma-2b.yaml"), []).corpora.instruction
    size = assumed_corpus("instruction", instruction, 576, 336, rows=None)
    lengths = size.lengths
    assert size.rows == 665_298
    assert lengths.length.max() <= instruction.max_length
    assert lengths.images.mean() == pytest.approx(624_610 / 665_298, abs=0.005)
    assert np.all(lengths.loss_tokens < lengths.length)
    assert "assumed: 665,298 rows" in size.source


def test_the_size_of_a_prepared_corpus_is_read_from_its_files(prepared_blocks: Blocks, toy_assets: Artifact) -> None:
    size = prepared_corpus(storage_path(prepared_blocks.folder))
    assert np.array_equal(size.lengths.length, prepared_blocks.lengths.length)
    assert size.rows == len(size.lengths)
    assert size.bytes == sum(block.bytes for block in prepared_blocks.manifest.blocks)
    with pytest.raises(UserError, match="no prepared corpus there"):
        prepared_corpus(toy_assets.path)
