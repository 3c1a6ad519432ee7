"""Preparing is total, deterministic and resumable: each row ends in a block or the quarantine, in the same bytes."""

import csv
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raylava.console import NullProgressBar
from raylava.corpus.blocks import Blocks, Manifest
from raylava.corpus.images import decode_stored, square
from raylava.corpus.prepare import PrepareSpec, make_block, prepare
from raylava.errors import RunError, UserError


def into(spec: PrepareSpec, output: Path, corpus_folder: Path | None = None, **settings: Any) -> PrepareSpec:
    corpus = spec.corpus.model_copy(update=settings)
    spec = dataclasses.replace(spec, corpus=corpus, output=str(output))
    if corpus_folder is None:
        return spec
    return dataclasses.replace(spec, places=((str(corpus_folder / "alignment.json"), str(corpus_folder / "images")),))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(spec: PrepareSpec) -> Manifest:
    return prepare(spec, "tokenizer", NullProgressBar())


def test_a_sample_holds_the_pixels_of_the_published_processor(prepare_job: PrepareSpec, tmp_path: Path) -> None:
    run(into(prepare_job, tmp_path))
    sample = Blocks(tmp_path)[0]
    annotations, images = prepare_job.places[0]
    row = json.loads(Path(annotations).read_text())[0]
    original = Image.open(Path(images) / row["image"])
    expected = square(np.asarray(original.convert("RGB")), prepare_job.vision.pixels, "pad")
    assert np.array_equal(decode_stored(sample.images[0]), expected)


def test_the_same_corpus_gives_the_same_bytes(prepare_job: PrepareSpec, tmp_path: Path) -> None:
    run(into(prepare_job, tmp_path / "one"))
    run(into(prepare_job, tmp_path / "two"))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_second_run_makes_only_the_blocks_that_are_missing(
    prepare_job: PrepareSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, interrupted = into(prepare_job, tmp_path / "whole"), into(prepare_job, tmp_path / "interrupted")
    run(whole)
    asked: list[int] = []

    def one_block_then_die(spec: PrepareSpec, pending: list[int], labels: dict[str, str]) -> Any:
        asked.extend(pending)
        yield make_block(spec, pending[0])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("raylava.corpus.prepare._run", one_block_then_die)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(interrupted)
    assert asked == [0, 1, 2, 1, 2]
    run(interrupted)
    assert tree(tmp_path / "interrupted") == tree(tmp_path / "whole")


def break_rows(folder: Path) -> dict[str, str]:
    """Damage one row for each reason; returns the expected reason by sample id."""
    file = folder / "alignment.json"
    rows = json.loads(file.read_text())
    images = folder / "images"
    expected: dict[str, str] = {}

    def damage(number: int, reason: str, **changes: Any) -> Path:
        rows[number].update(changes)
        expected[f"{rows[number]['id']}#0.0.{number}"] = reason
        return images / rows[number]["image"]

    damage(0, "image missing").unlink()
    damage(1, "image unreadable").write_bytes(b"no image at all")
    image = damage(2, "image truncated")
    image.write_bytes(image.read_bytes()[:-40])
    Image.new("1", (9000, 9000)).save(damage(3, "image too large"))
    damage(4, "image path escapes the root", image="../alignment.json")
    damage(5, "no turns", conversations=[])
    damage(6, "turns do not alternate", conversations=rows[6]["conversations"][::-1])
    damage(
        7, "image without image token", conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "a"}]
    )
    talk = [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "a"}]
    damage(8, "image token without image", conversations=talk)
    damage(9, "nothing supervised", conversations=[rows[9]["conversations"][0], {"from": "gpt", "value": " "}])
    damage(10, "too long", conversations=[rows[10]["conversations"][0], {"from": "gpt", "value": "word " * 500}])
    (images / "caption" / "link.png").symlink_to(file)
    damage(11, "image path escapes the root", image="caption/link.png")
    damage(12, "image missing", image="caption")
    Image.open(images / rows[13]["image"]).save(images / rows[13]["image"], "GIF")  # a GIF called .png is read
    rows[14] = "not a row"
    expected["#0.0.14"] = "not a row"
    file.write_text(json.dumps(rows))
    return expected


def test_every_bad_row_is_set_aside_with_its_reason_and_no_row_is_lost(
    prepare_job: PrepareSpec, corpus_copy: Path, tmp_path: Path
) -> None:
    expected = break_rows(corpus_copy)
    manifest = run(into(prepare_job, tmp_path / "out", corpus_copy, quarantine_limit=0.5))
    with (tmp_path / "out" / "quarantine.csv").open() as stream:
        quarantined = {row["sample_id"]: row["reason"] for row in csv.DictReader(stream)}
    assert quarantined == expected
    blocks = Blocks(tmp_path / "out")
    in_blocks = {blocks[number].sample_id for number in range(len(blocks))}
    assert not in_blocks & set(quarantined)
    assert manifest.rows_in == len(in_blocks) + len(quarantined) == 40
    assert manifest.quarantine == dict(Counter(expected.values()))


def test_too_many_bad_rows_stop_the_run_and_a_higher_limit_lets_it_go_on(
    prepare_job: PrepareSpec, corpus_copy: Path, tmp_path: Path
) -> None:
    break_rows(corpus_copy)
    with pytest.raises(UserError, match=r"rows had to be set aside, more than quarantine_limit=0\.01 allows"):
        run(into(prepare_job, tmp_path / "out", corpus_copy))
    assert run(into(prepare_job, tmp_path / "out", corpus_copy, quarantine_limit=0.5)).quarantined == 14


def test_a_selection_that_takes_no_row_is_the_users_mistake(prepare_job: PrepareSpec, tmp_path: Path) -> None:
    nowhere = prepare_job.corpus.sources[0].model_copy(update={"include": ("nowhere/*",)})
    with pytest.raises(UserError, match="no row is chosen"):
        run(into(prepare_job, tmp_path, sources=(nowhere,)))


def test_an_image_folder_that_vanishes_is_told_in_one_line_not_row_by_row(
    prepare_job: PrepareSpec, corpus_copy: Path, tmp_path: Path
) -> None:
    spec = into(prepare_job, tmp_path / "out", corpus_copy)
    (corpus_copy / "images").rename(corpus_copy / "moved")
    with pytest.raises(RunError, match=r"preparing corpora\.alignment failed: .*images") as error:
        run(spec)
    assert "\n" not in str(error.value)
