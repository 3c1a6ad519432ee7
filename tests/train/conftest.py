"""Blocks of the tiny laboratory's conversations, prepared in this process."""

import pytest

from raylava.artifacts import Artifact
from raylava.console import Silent
from raylava.corpus.blocks import Blocks
from raylava.corpus.prepare import Job, prepare
from raylava.model.backbones import LanguageSpec, VisionSpec, load_tokenizer
from raylava.model.templates import IMAGE_TOKEN
from raylava.recipe import Corpus, Model, Source, Storing
from raylava.train.feed import Layout


@pytest.fixture(scope="session")
def prepared_blocks(
    lab: Artifact,
    micro_model: Model,
    vision: VisionSpec,
    language: LanguageSpec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Blocks:
    folder = lab.place / "corpus"
    output = tmp_path_factory.mktemp("blocks")
    source = Source(annotations="instruction.json", images="pictures")
    job = Job(
        "instruction",
        Corpus(sources=(source,), max_length=256, store=Storing(format="png")),
        ((str(folder / "instruction.json"), str(folder / "pictures")),),
        micro_model.language,
        language.template,
        vision,
        str(output),
    )
    prepare(job, "tokenizer", Silent())
    return Blocks(output)


@pytest.fixture(scope="session")
def blocks_layout(micro_model: Model, vision: VisionSpec) -> Layout:
    tokenizer = load_tokenizer(micro_model.language)
    return Layout(vision, *tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, "<bos>"]))
