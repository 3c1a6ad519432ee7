"""Preparation is total and deterministic: every row ends in a block or in the quarantine, in the same bytes."""

import csv
import dataclasses
import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raylava.config.recipe import FetchConfig
from raylava.corpus.block_writer import make_block
from raylava.corpus.blocks import Blocks, Sample
from raylava.corpus.images import decode_block_image, resize_exact
from raylava.corpus.prepare import check_quarantine, publish_corpus
from raylava.corpus.shards import PrepareSpec, stage_rows
from raylava.errors import UserError
from raylava.storage import storage_path
from tests.support.corpora import file_tree, prepare_serially, read_rows, read_samples, with_settings
from tests.support.image_server import ImageServer
from tests.support.malformed_rows import damage_rows

Rows = list[dict[str, Any]]


def prepare_to(spec: PrepareSpec, output: Path) -> Blocks:
    prepare_serially(dataclasses.replace(spec, output=str(output)))
    return Blocks(output)


@pytest.fixture(scope="module")
def reference(prepare_spec: PrepareSpec, tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    return prepare_to(prepare_spec, tmp_path_factory.mktemp("reference"))


def test_sample_has_the_pixels_of_the_exported_processor(prepare_spec: PrepareSpec, reference: Blocks) -> None:
    rows, images = read_rows(prepare_spec)
    original = Image.open(images / rows[0]["image"])
    expected = resize_exact(np.asarray(original.convert("RGB")), prepare_spec.vision.pixels, "pad")
    assert np.array_equal(decode_block_image(reference[0].images[0]), expected)


def test_preparing_twice_gives_the_same_bytes(prepare_spec: PrepareSpec, reference: Blocks, tmp_path: Path) -> None:
    prepare_to(prepare_spec, tmp_path)
    assert file_tree(tmp_path) == file_tree(reference.folder)


def test_malformed_rows_are_quarantined_with_their_reasons_and_no_row_is_lost(
    prepare_spec: PrepareSpec, corpus_copy: Path, tmp_path: Path
) -> None:
    expected = damage_rows(corpus_copy)
    manifest = prepare_serially(with_settings(prepare_spec, tmp_path / "out", corpus_copy, quarantine_limit=0.5))
    with (tmp_path / "out" / "quarantine.csv").open() as stream:
        quarantined = {row["sample_id"]: row["reason"] for row in csv.DictReader(stream)}
    assert quarantined == expected
    in_blocks = {sample.sample_id for sample in read_samples(Blocks(tmp_path / "out"))}
    assert not in_blocks & set(quarantined)
    assert manifest.rows_in == len(in_blocks) + len(quarantined) == 40
    assert manifest.quarantine == dict(Counter(expected.values()))


def test_corpus_that_lost_a_row_is_never_published(prepare_spec: PrepareSpec, tmp_path: Path) -> None:
    spec = dataclasses.replace(prepare_spec, output=str(tmp_path))
    rows, shards = stage_rows(spec, storage_path(tmp_path))
    for shard in range(shards):
        make_block(spec, shard)
    with pytest.raises(AssertionError, match="a source row was lost"):
        publish_corpus(spec, storage_path(tmp_path), shards, rows + 1, "tokenizer")
    assert not (tmp_path / "manifest.json").exists()


def test_more_quarantined_rows_than_the_limit_raise_user_error(prepare_spec: PrepareSpec, tmp_path: Path) -> None:
    check_quarantine({"quarantined": 1, "rows_in": 100}, "alignment", prepare_spec.corpus, storage_path(tmp_path))
    with pytest.raises(UserError, match=r"alignment: 2 of 100 rows were quarantined, more than quarantine_limit=0\.01"):
        check_quarantine({"quarantined": 2, "rows_in": 100}, "alignment", prepare_spec.corpus, storage_path(tmp_path))


def test_selecting_no_row_raises_user_error(prepare_spec: PrepareSpec, tmp_path: Path) -> None:
    no_match = prepare_spec.corpus.sources[0].model_copy(update={"include": ("nowhere/*",)})
    with pytest.raises(UserError, match="no row is selected"):
        stage_rows(with_settings(prepare_spec, tmp_path, sources=(no_match,)), storage_path(tmp_path))


def without_ids(blocks: Blocks) -> list[Sample]:
    return [dataclasses.replace(sample, sample_id="") for sample in read_samples(blocks)]


def write_jsonl(rows: Rows, images: Path, folder: Path) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def write_parquet(rows: Rows, images: Path, folder: Path) -> str:
    """Write a folder of two files, with `messages` and an image column as `datasets` exports them."""
    table = [
        {
            "id": row["id"],
            "image": {"bytes": (images / row["image"]).read_bytes(), "path": row["image"]},
            "messages": [
                {"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]}
                for turn in row["conversations"]
            ],
        }
        for row in rows
    ]
    (folder / "parquet").mkdir()
    for number, first in enumerate((0, 20)):
        pq.write_table(pa.Table.from_pylist(table[first : first + 20]), folder / "parquet" / f"{number}.parquet")
    return str(folder / "parquet")


def write_webdataset(rows: Rows, images: Path, folder: Path) -> str:
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for number, row in enumerate(rows):
            conversation = json.dumps({"id": row["id"], "conversations": row["conversations"]}).encode()
            for suffix, content in (("png", (images / row["image"]).read_bytes()), ("json", conversation)):
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(folder / "rows.tar")


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_webdataset])
def test_every_format_gives_the_same_samples(
    prepare_spec: PrepareSpec, reference: Blocks, write: Callable[[Rows, Path, Path], str], tmp_path: Path
) -> None:
    rows, images = read_rows(prepare_spec)
    spec = dataclasses.replace(prepare_spec, source_paths=((write(rows, images, tmp_path), str(images)),))
    assert without_ids(prepare_to(spec, tmp_path / "out")) == without_ids(reference)


def test_sources_mix_by_weight_and_max_rows_and_ids_stay_unique(prepare_spec: PrepareSpec, tmp_path: Path) -> None:
    source = prepare_spec.corpus.sources[0]
    sources = (source.model_copy(update={"max_rows": 5}), source.model_copy(update={"sampling_weight": 2.0}))
    corpus = prepare_spec.corpus.model_copy(update={"sources": sources})
    paths = prepare_spec.source_paths * 2
    mixed = prepare_to(dataclasses.replace(prepare_spec, corpus=corpus, source_paths=paths), tmp_path)
    ids = [sample.sample_id for sample in read_samples(mixed)]
    assert len(ids) == len(set(ids)) == 5 + 2 * 40


def test_truncation_drops_whole_exchanges_from_the_end(prepare_spec: PrepareSpec, tmp_path: Path) -> None:
    rows, images = read_rows(prepare_spec)
    exchange = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "yes"}]
    rows[0]["conversations"] += exchange * 12
    rows[1]["conversations"] += [{"from": "human", "value": "word " * 200}, {"from": "gpt", "value": "yes"}]
    rows[2]["conversations"][1]["value"] = "word " * 200
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    corpus = prepare_spec.corpus.model_copy(update={"on_overlong": "truncate_exchanges", "quarantine_limit": 0.1})
    paths = ((str(tmp_path / "rows.json"), str(images)),)
    blocks = prepare_to(dataclasses.replace(prepare_spec, corpus=corpus, source_paths=paths), tmp_path / "out")
    assert blocks.manifest.truncated == 2
    assert blocks.manifest.quarantine == {"too long": 1}, "a first exchange is never truncated"
    assert 1 < len(blocks[0].loss_spans) < 13
    assert len(blocks[1].loss_spans) == 1
    assert blocks.lengths.length.max() <= prepare_spec.corpus.max_length


def test_truncation_at_the_token_cuts_answers_and_sets_rows_without_any_aside(
    prepare_spec: PrepareSpec, tmp_path: Path
) -> None:
    rows, images = read_rows(prepare_spec)
    rows[0]["conversations"] += [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "yes " * 200}]
    rows[1]["conversations"] += [{"from": "human", "value": "word " * 200}, {"from": "gpt", "value": "yes"}]
    rows[2]["conversations"][0]["value"] += " word" * 200
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    corpus = prepare_spec.corpus.model_copy(update={"on_overlong": "truncate_tokens", "quarantine_limit": 0.1})
    paths = ((str(tmp_path / "rows.json"), str(images)),)
    blocks = prepare_to(dataclasses.replace(prepare_spec, corpus=corpus, source_paths=paths), tmp_path / "out")
    assert blocks.manifest.truncated == 2
    assert blocks.manifest.quarantine == {"nothing supervised": 1}
    cut_answer, cut_question = blocks[0], blocks[1]
    assert cut_answer.length == cut_question.length == prepare_spec.corpus.max_length
    assert cut_answer.loss_spans[-1][1] == len(cut_answer.input_ids)
    assert len(cut_answer.loss_spans) == 2
    assert len(cut_question.loss_spans) == 1


def test_images_by_url_are_fetched_recorded_and_quarantined_with_their_reason(
    prepare_spec: PrepareSpec, reference: Blocks, tmp_path: Path
) -> None:
    rows, images = read_rows(prepare_spec)
    server = ImageServer((images / rows[0]["image"]).read_bytes())
    rows[0]["image"], rows[1]["image"] = f"{server.url}/a.png", f"{server.url}/status/404"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    fetch = FetchConfig(allow_private_addresses=True)
    corpus = prepare_spec.corpus.model_copy(update={"fetch": fetch, "quarantine_limit": 0.1})
    paths = ((str(tmp_path / "rows.json"), str(images)),)
    blocks = prepare_to(dataclasses.replace(prepare_spec, corpus=corpus, source_paths=paths), tmp_path / "out")
    server.close()
    assert blocks[0].images == reference[0].images
    assert blocks.manifest.quarantine == {"image not fetched": 1}
    assert "HTTP status 404" in (tmp_path / "out" / "quarantine.csv").read_text()
    record = blocks.manifest.blocks[0]
    content = (tmp_path / "out" / "fetched" / "images-00000.jsonl").read_bytes()
    assert (record.fetched, record.fetched_sha256) == (2, hashlib.sha256(content).hexdigest())
    lines = [json.loads(line) for line in content.splitlines()]
    assert lines[0]["sha256"] == hashlib.sha256(server.image).hexdigest()
    assert [other.fetched for other in blocks.manifest.blocks[1:]] == [0] * (len(blocks.manifest.blocks) - 1)


def test_blocks_open_in_pyarrow_and_datasets_without_raylava(reference: Blocks) -> None:
    import datasets

    file = str(reference.folder / reference.manifest.blocks[0].path)
    with pa.memory_map(file) as mapped:
        table = pa.ipc.open_stream(mapped).read_all()
    assert table["sample_id"][3].as_py() == reference[3].sample_id
    dataset = datasets.Dataset.from_file(file)
    assert dataset[3]["input_ids"] == reference[3].input_ids
    assert dataset[3]["images"] == reference[3].images
