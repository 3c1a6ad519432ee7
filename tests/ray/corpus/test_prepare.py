"""Preparation with Ray Data: the same bytes at any parallelism and location, resumable, and bounded in memory."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import ray.data
from PIL import Image

from raylava.config.recipe import Corpus
from raylava.corpus.block_writer import make_block
from raylava.corpus.blocks import BlockRecord, Blocks, Manifest, decode_quarantine
from raylava.corpus.prepare import ImageFolder, MapOnCluster, prepare, publish_corpus
from raylava.corpus.shards import PrepareSpec
from raylava.errors import RunError, UserError
from raylava.local_copies import local_copy
from raylava.progress import NullProgressBar
from raylava.storage import storage_path
from tests.conftest import SECRET
from tests.support.corpora import file_tree, prepare_serially, read_rows, read_samples, with_settings
from tests.support.malformed_rows import damage_rows
from tests.support.prepare_process import environment_without_ray, start_prepare

pytestmark = pytest.mark.usefixtures("ray_cluster")


def run(spec: PrepareSpec) -> Manifest:
    return prepare(spec, "tokenizer", NullProgressBar())


@pytest.fixture(scope="module")
def reference(prepare_spec: PrepareSpec, tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    output = tmp_path_factory.mktemp("reference")
    prepare_serially(dataclasses.replace(prepare_spec, output=str(output)))
    return Blocks(output)


def test_ray_data_gives_the_same_bytes_as_serial_preparation(
    prepare_spec: PrepareSpec, reference: Blocks, tmp_path: Path
) -> None:
    run(with_settings(prepare_spec, tmp_path / "one"))
    run(with_settings(prepare_spec, tmp_path / "two"))
    assert file_tree(tmp_path / "one") == file_tree(tmp_path / "two") == file_tree(reference.folder)


def test_operators_give_the_same_bytes_as_serial_preparation_and_passes_that_are_done_are_not_repeated(
    prepare_spec: PrepareSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = [
        "tests.support.user_operators:twice",
        "exact_duplicates",
        {"similar_duplicates": {"compare": "image", "distance": 1}},
        {"decontaminate": {"benchmarks": ["held_out"]}},
    ]
    settings = Corpus.model_validate({"sources": prepare_spec.corpus.sources, "operators": operators}).operators
    benchmarks = {"held_out": ImageFolder(prepare_spec.source_paths[0][1], [read_rows(prepare_spec)[0][0]["image"]])}
    expected = prepare_serially(with_settings(prepare_spec, tmp_path / "serial", operators=settings), benchmarks)
    assert expected.added == expected.rows_in
    assert expected.quarantine["filtered by exact_duplicates"] >= expected.rows_in
    assert expected.quarantine["filtered by decontaminate"] >= 1

    def die(*arguments: Any) -> Iterator[BlockRecord]:
        raise KeyboardInterrupt

    with_operators = with_settings(prepare_spec, tmp_path / "ray", operators=settings)
    with monkeypatch.context() as patch:
        patch.setattr("raylava.corpus.prepare._make_blocks", die)
        with pytest.raises(KeyboardInterrupt):
            prepare(with_operators, "tokenizer", NullProgressBar(), None, benchmarks)
    keys = [tmp_path / "ray" / "rows" / f"keys-{operator}-{shard:05d}.arrow" for operator in (1, 2) for shard in (0, 1)]
    written = {file: file.stat().st_mtime_ns for file in keys}
    seen: list[dict[Path, int]] = []
    publish = publish_corpus
    with monkeypatch.context() as patch:
        patch.setattr(
            "raylava.corpus.prepare.publish_corpus",
            lambda *arguments: [seen.append({file: file.stat().st_mtime_ns for file in keys}), publish(*arguments)][1],
        )
        prepare(with_operators, "tokenizer", NullProgressBar(), None, benchmarks)
    assert seen == [written]
    assert file_tree(tmp_path / "ray") == file_tree(tmp_path / "serial")


def test_second_run_prepares_only_missing_blocks(
    prepare_spec: PrepareSpec, reference: Blocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted = with_settings(prepare_spec, tmp_path)
    missing: list[int] = []

    def make_one_block_and_die(
        spec: PrepareSpec, shards: list[int], map_on_cluster: MapOnCluster
    ) -> Iterator[BlockRecord]:
        missing.extend(shards)
        yield make_block(spec, shards[0])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("raylava.corpus.prepare._make_blocks", make_one_block_and_die)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(interrupted)
    assert missing == [0, 1, 2, 1, 2]
    run(interrupted)
    assert file_tree(tmp_path) == file_tree(reference.folder)


def test_too_many_quarantined_rows_stop_the_run_and_a_higher_limit_resumes_it(
    prepare_spec: PrepareSpec, corpus_copy: Path, tmp_path: Path
) -> None:
    damage_rows(corpus_copy)
    with pytest.raises(UserError, match=r"rows were quarantined, more than quarantine_limit=0\.01 allows"):
        run(with_settings(prepare_spec, tmp_path / "out", corpus_copy))
    assert run(with_settings(prepare_spec, tmp_path / "out", corpus_copy, quarantine_limit=0.5)).quarantined == 14


def test_missing_image_folder_fails_in_one_line_instead_of_quarantining_every_row(
    prepare_spec: PrepareSpec, corpus_copy: Path, tmp_path: Path
) -> None:
    spec = with_settings(prepare_spec, tmp_path / "out", corpus_copy)
    (corpus_copy / "images").rename(corpus_copy / "moved")
    with pytest.raises(RunError, match=r"preparing corpora\.alignment failed: .*images") as error:
        run(spec)
    assert "\n" not in str(error.value)


def test_corpus_on_s3_is_prepared_to_s3_with_the_same_bytes_and_without_secrets(
    prepare_spec: PrepareSpec, reference: Blocks, s3: str
) -> None:
    _, images = read_rows(prepare_spec)
    corpus = storage_path(f"{s3}/corpus")
    pafs.copy_files(str(images.parent), corpus.path, destination_filesystem=corpus.filesystem)
    paths = ((f"{s3}/corpus/alignment.json", f"{s3}/corpus/images"),)
    run(dataclasses.replace(prepare_spec, source_paths=paths, output=f"{s3}/blocks"))
    blocks = Blocks(local_copy(storage_path(f"{s3}/blocks")))
    assert read_samples(blocks) == read_samples(reference)
    assert file_tree(blocks.folder) == file_tree(reference.folder)
    assert not [name for name, content in file_tree(blocks.folder).items() if SECRET.encode() in content]


def test_rows_that_abort_their_process_are_quarantined_and_counted(prepare_spec: PrepareSpec, tmp_path: Path) -> None:
    operators = [
        {"tests.support.user_operators:aborting_key": {"numbers": [3]}},
        {"tests.support.user_operators:aborting": {"numbers": [3, 20]}},
    ]
    settings = Corpus.model_validate({"sources": prepare_spec.corpus.sources, "operators": operators}).operators
    manifest = run(with_settings(prepare_spec, tmp_path, operators=settings, quarantine_limit=0.5))
    assert (manifest.rows_in, manifest.rows, manifest.quarantine) == (40, 38, {"crashed": 2})
    quarantine = decode_quarantine((tmp_path / "quarantine.csv").read_bytes())
    assert [(row.row, row.detail) for row in quarantine] == [
        (3, "its processing ended the process (SIGABRT)"),
        (20, "its processing ended the process (SIGABRT)"),
    ]


def test_preparation_spreads_to_a_node_that_joins_and_two_nodes_give_the_same_bytes_as_one(
    prepare_spec: PrepareSpec, tmp_path: Path
) -> None:
    (tmp_path / "nodes").mkdir()
    slow = {"tests.support.user_operators:slow": {"seconds": 0.9, "folder": str(tmp_path / "nodes")}}
    operators = Corpus.model_validate({"sources": prepare_spec.corpus.sources, "operators": [slow]}).operators
    settings = {"operators": operators, "samples_per_block": 1}
    process = start_prepare(with_settings(prepare_spec, tmp_path / "grown", **settings), growing=True)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error[-3000:]
    assert len(list((tmp_path / "nodes").iterdir())) == 2
    prepare_serially(with_settings(prepare_spec, tmp_path / "alone", samples_per_block=1))
    assert file_tree(tmp_path / "grown") == file_tree(tmp_path / "alone")


MEMORY_SCRIPT = """
import json, os, pickle, sys
import psutil, ray
from raylava.corpus.prepare import prepare
from raylava.progress import NullProgressBar

def unshared_memory():
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            name = " ".join(process.cmdline())
            if process.pid == os.getpid() or "ray::MapWorker" in name:
                total += process.memory_full_info().uss
        except psutil.NoSuchProcess:  # ended since it was listed
            pass
    return total

class MemoryProbe(NullProgressBar):
    "A progress bar that measures the memory of driver and workers after each block."
    def __init__(self):
        self.measurements = []
    def update(self, done, total, **metrics):
        if done:
            self.measurements.append(unshared_memory())

ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
probe = MemoryProbe()
prepare(pickle.loads(bytes.fromhex(sys.argv[1])), "tokenizer", probe)
print(json.dumps(probe.measurements))
ray.shutdown()
"""


def test_memory_is_bounded_by_the_blocks_in_flight(prepare_spec: PrepareSpec, tmp_path: Path) -> None:
    """Driver and two workers together grow by less than 100 MB while they read 1.6 GB of images."""
    rows, _ = read_rows(prepare_spec)
    Image.frombytes("RGB", (400, 400), os.urandom(400 * 400 * 3)).save(tmp_path / "big.bmp")
    big = [{**row, "image": "big.bmp"} for row in rows] * 85  # 3,400 rows × 480 kB
    (tmp_path / "rows.json").write_text(json.dumps(big))
    corpus = prepare_spec.corpus.model_copy(update={"samples_per_block": 100})
    paths = ((str(tmp_path / "rows.json"), str(tmp_path)),)
    spec = dataclasses.replace(prepare_spec, corpus=corpus, source_paths=paths, output=str(tmp_path / "out"))
    process = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, pickle.dumps(spec).hex()],
        capture_output=True,
        text=True,
        check=False,
        env=environment_without_ray(),
    )
    assert process.returncode == 0, process.stderr[-3000:]
    measurements = json.loads(process.stdout.splitlines()[-1])
    assert len(measurements) == 34
    assert max(measurements[4:]) - measurements[3] < 100e6, "30 further blocks need no more memory than the first"


def test_blocks_are_made_on_the_nodes_of_the_role(
    ray_cluster: None, prepare_spec: PrepareSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selectors = []
    map_rows = ray.data.Dataset.map

    def spy(dataset: ray.data.Dataset, function: Any, **settings: Any) -> ray.data.Dataset:
        selectors.append(settings.pop("label_selector"))
        return map_rows(dataset, function, **settings)

    monkeypatch.setattr(ray.data.Dataset, "map", spy)
    monkeypatch.setattr("raylava.corpus.parallel.matching_resources", lambda labels: {"CPU": 1.0})
    monkeypatch.setattr("raylava.corpus.parallel.eventual_resources", lambda labels: {"CPU": 1.0})
    prepare(dataclasses.replace(prepare_spec, output=str(tmp_path)), "tokenizer", NullProgressBar(), {"disk": "ssd"})
    assert selectors == [{"disk": "ssd"}]
