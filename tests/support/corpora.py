"""Prepares small corpora without Ray, and compares the resulting folders."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raylava.artifacts import Artifact
from raylava.config.recipe import Corpus, ImageEncoding, Source
from raylava.corpus.block_writer import make_block
from raylava.corpus.blocks import Blocks, Manifest, Sample
from raylava.corpus.prepare import ImageFolder, prepare_operators, publish_corpus
from raylava.corpus.shards import PrepareSpec, stage_rows
from raylava.models.registry import LanguageSpec, VisionSpec
from raylava.storage import storage_path


def alignment_spec(toy_assets: Artifact, language: LanguageSpec, vision: VisionSpec, output: Path) -> PrepareSpec:
    """Return a spec for the toy assets' captions: 40 rows in blocks of 16."""
    source = Source(annotations="alignment.json", images="images")
    corpus = Corpus(sources=(source,), max_length=128, image_encoding=ImageEncoding(format="png"), samples_per_block=16)
    folder = toy_assets.path / "corpus"
    paths = ((str(folder / "alignment.json"), str(folder / "images")),)
    return PrepareSpec("alignment", corpus, paths, language, vision, str(output))


def with_settings(
    spec: PrepareSpec, output: Path, corpus_folder: Path | None = None, **corpus_settings: Any
) -> PrepareSpec:
    """Return the spec with another output, optionally another folder of the alignment corpus, and changed settings."""
    corpus = spec.corpus.model_copy(update=corpus_settings)
    spec = dataclasses.replace(spec, corpus=corpus, output=str(output))
    if corpus_folder is None:
        return spec
    paths = ((str(corpus_folder / "alignment.json"), str(corpus_folder / "images")),)
    return dataclasses.replace(spec, source_paths=paths)


def map_serially(function: Callable[[int], Mapping[str, Any]], items: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Map items in this process, in place of Ray Data."""
    return (dict(function(item)) for item in items)


def prepare_serially(spec: PrepareSpec, benchmarks: Mapping[str, ImageFolder] | None = None) -> Manifest:
    """Prepare a corpus in this process, by the functions that Ray Data's workers call."""
    output = storage_path(spec.output)
    rows_in, shards = stage_rows(spec, output)
    prepare_operators(spec, shards, benchmarks or {}, map_serially)
    for shard in range(shards):
        make_block(spec, shard)
    return publish_corpus(spec, output, shards, rows_in, "tokenizer")


def read_rows(spec: PrepareSpec) -> tuple[list[dict[str, Any]], Path]:
    """Return the rows of the first source, and its image folder."""
    annotations, images = spec.source_paths[0]
    return json.loads(Path(annotations).read_text()), Path(images)


def read_samples(blocks: Blocks) -> list[Sample]:
    return [blocks[number] for number in range(len(blocks))]


def file_tree(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
