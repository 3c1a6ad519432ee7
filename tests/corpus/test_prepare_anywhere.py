"""The same corpus gives the same blocks from any format, from S3, on two nodes, and after SIGKILL."""

import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raylava.config.recipe import Source
from raylava.console import NullProgressBar
from raylava.corpus.blocks import Blocks, Sample
from raylava.corpus.prepare import PrepareSpec, prepare
from raylava.storage import storage_path
from tests.conftest import SECRET


def prepared(spec: PrepareSpec, output: Path | str) -> Blocks:
    prepare(dataclasses.replace(spec, output=str(output)), "tokenizer", NullProgressBar())
    return Blocks.at(storage_path(output))


def samples(blocks: Blocks) -> list[Sample]:
    return [blocks[number] for number in range(len(blocks))]


def without_ids(blocks: Blocks) -> list[Sample]:
    return [dataclasses.replace(sample, sample_id="") for sample in samples(blocks)]


def rows_of(spec: PrepareSpec) -> tuple[list[dict[str, Any]], Path]:
    annotations, images = spec.places[0]
    return json.loads(Path(annotations).read_text()), Path(images)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def reference(prepare_job: PrepareSpec, tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    return prepared(prepare_job, tmp_path_factory.mktemp("reference"))


def write_jsonl(rows: list[dict[str, Any]], images: Path, folder: Path) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def write_parquet(rows: list[dict[str, Any]], images: Path, folder: Path) -> str:
    """As `datasets` exports an image column, with `messages`."""
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
    for part in range(2):  # a folder of files
        pq.write_table(pa.Table.from_pylist(table[part * 20 : part * 20 + 20]), folder / "parquet" / f"{part}.parquet")
    return str(folder / "parquet")


def write_webdataset(rows: list[dict[str, Any]], images: Path, folder: Path) -> str:
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for number, row in enumerate(rows):
            talk = {"id": row["id"], "conversations": row["conversations"]}
            for suffix, content in (("png", (images / row["image"]).read_bytes()), ("json", json.dumps(talk).encode())):
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(folder / "rows.tar")


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_webdataset])
def test_every_format_gives_the_same_samples(
    prepare_job: PrepareSpec, reference: Blocks, write: Any, tmp_path: Path
) -> None:
    rows, images = rows_of(prepare_job)
    spec = dataclasses.replace(prepare_job, places=((write(rows, images, tmp_path), str(images)),))
    assert without_ids(prepared(spec, tmp_path / "out")) == without_ids(reference)


def test_sources_mix_by_weight_and_limit_and_ids_stay_unique(prepare_job: PrepareSpec, tmp_path: Path) -> None:
    one = prepare_job.corpus.sources[0]
    sources = (one.model_copy(update={"max_rows": 5}), one.model_copy(update={"sampling_weight": 2.0}))
    corpus = prepare_job.corpus.model_copy(update={"sources": sources})
    mixed = prepared(dataclasses.replace(prepare_job, corpus=corpus, places=prepare_job.places * 2), tmp_path)
    ids = [sample.sample_id for sample in samples(mixed)]
    assert len(ids) == len(set(ids)) == 5 + 2 * 40


def test_a_corpus_on_s3_is_prepared_to_s3_and_no_secret_stays_there(
    prepare_job: PrepareSpec, reference: Blocks, s3: str, tmp_path: Path
) -> None:
    _, images = rows_of(prepare_job)
    corpus = storage_path(f"{s3}/corpus")
    pafs.copy_files(str(images.parent), corpus.path, destination_filesystem=corpus.filesystem)
    places = ((f"{s3}/corpus/alignment.json", f"{s3}/corpus/images"),)
    blocks = prepared(dataclasses.replace(prepare_job, places=places), f"{s3}/blocks")
    assert samples(blocks) == samples(reference)
    assert tree(blocks.folder) == tree(reference.folder), "byte for byte"
    assert not [name for name, content in tree(blocks.folder).items() if SECRET.encode() in content]


def test_trimming_leaves_whole_exchanges_off_the_end(prepare_job: PrepareSpec, tmp_path: Path) -> None:
    rows, images = rows_of(prepare_job)
    short = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "yes"}]
    rows[0]["conversations"] += short * 12
    rows[1]["conversations"] += [{"from": "human", "value": "word " * 200}, {"from": "gpt", "value": "yes"}]
    rows[2]["conversations"][1]["value"] = "word " * 200
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    corpus = prepare_job.corpus.model_copy(update={"on_overlong": "truncate_exchanges", "quarantine_limit": 0.1})
    places = ((str(tmp_path / "rows.json"), str(images)),)
    blocks = prepared(dataclasses.replace(prepare_job, corpus=corpus, places=places), tmp_path / "out")
    assert blocks.manifest.trimmed == 2
    assert blocks.manifest.quarantine == {"too long": 1}, "a first exchange is never cut"
    assert 1 < len(blocks[0].loss_spans) < 13
    assert len(blocks[1].loss_spans) == 1
    assert blocks.lengths.length.max() <= prepare_job.corpus.max_length


def test_blocks_open_in_pyarrow_and_datasets_without_raylava(reference: Blocks) -> None:
    import datasets

    file = str(reference.folder / reference.manifest.blocks[0].path)
    with pa.memory_map(file) as mapped:
        table = pa.ipc.open_stream(mapped).read_all()
    assert table["sample_id"][3].as_py() == reference[3].sample_id
    opened = datasets.Dataset.from_file(file)
    assert opened[3]["input_ids"] == reference[3].input_ids
    assert opened[3]["images"] == reference[3].images


# In processes of their own: what is killed, and clusters beside the session's.

SCRIPT = """
import pickle, sys
import ray
from raylava.console import Silent
from raylava.corpus.prepare import prepare
spec = pickle.loads(bytes.fromhex(sys.argv[1]))
nodes = int(sys.argv[2])
if nodes:
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
else:
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
prepare(spec, "tokenizer", Silent())
ray.shutdown()
"""


def start(spec: PrepareSpec, nodes: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, pickle.dumps(spec).hex(), str(nodes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},  # not the session's Ray
    )


def wait_for_five(records: Path, run: "subprocess.Popen[bytes]") -> None:
    """Until five blocks are done."""
    deadline = time.monotonic() + 120
    while len(list(records.glob("record-*.json"))) < 5:
        assert run.poll() is None, run.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_two_nodes_give_the_same_bytes_as_one(prepare_job: PrepareSpec, reference: Blocks, tmp_path: Path) -> None:
    run = start(dataclasses.replace(prepare_job, output=str(tmp_path)), nodes=2)
    _, error = run.communicate(timeout=240)
    assert run.returncode == 0, error[-3000:]
    assert tree(tmp_path) == tree(reference.folder)


@pytest.mark.slow
def test_after_sigkill_the_same_command_goes_on_and_ends_with_the_same_bytes(
    prepare_job: PrepareSpec, tmp_path: Path
) -> None:
    corpus = prepare_job.corpus.model_copy(
        update={"samples_per_block": 2, "sources": (Source(annotations="a", sampling_weight=20.0),)}
    )
    whole = dataclasses.replace(prepare_job, corpus=corpus, output=str(tmp_path / "whole"))
    killed = dataclasses.replace(whole, output=str(tmp_path / "killed"))
    prepare(whole, "tokenizer", NullProgressBar())
    run = start(killed, nodes=0)
    records = tmp_path / "killed" / "rows"
    wait_for_five(records, run)
    for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
        process.kill()  # SIGKILL, driver and cluster alike
    run.wait()
    done = [record.name for record in records.glob("record-*.json")]
    assert 5 <= len(done) < 400, "it was killed on the way"
    blocks = tmp_path / "killed" / "blocks"
    kept = {
        name: (blocks / name.replace("record", "block").replace("json", "arrow")).stat().st_mtime_ns for name in done
    }
    prepare(killed, "tokenizer", NullProgressBar())
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    after = {
        name: (blocks / name.replace("record", "block").replace("json", "arrow")).stat().st_mtime_ns for name in done
    }
    assert after == kept, "finished blocks were not made again"


@pytest.mark.slow
def test_a_worker_killed_on_the_way_changes_nothing(prepare_job: PrepareSpec, tmp_path: Path) -> None:
    corpus = prepare_job.corpus.model_copy(
        update={"samples_per_block": 4, "sources": (Source(annotations="a", sampling_weight=20.0),)}
    )
    whole = dataclasses.replace(prepare_job, corpus=corpus, output=str(tmp_path / "whole"))
    prepare(whole, "tokenizer", NullProgressBar())
    run = start(dataclasses.replace(whole, output=str(tmp_path / "hurt")), nodes=0)
    wait_for_five(tmp_path / "hurt" / "rows", run)
    family = psutil.Process(run.pid).children(recursive=True)
    workers = [one for one in family if "MapWorker" in " ".join(one.cmdline())]
    assert workers
    for worker in workers:
        worker.kill()
    _, error = run.communicate(timeout=240)
    assert run.returncode == 0, error[-3000:]
    assert tree(tmp_path / "hurt") == tree(tmp_path / "whole")


WATCHED = """
import json, os, pickle, sys, threading
import psutil, ray
from raylava.corpus.prepare import prepare

def unshared():
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        name = " ".join(process.cmdline())
        if process.pid == os.getpid() or "ray::MapWorker" in name:
            total += process.memory_full_info().uss
    return total

class Watch:
    "A bar that weighs driver and workers each time a block is done."
    def __init__(self):
        self.weights = []
    def update(self, done, total, **figures):
        if done:
            self.weights.append(unshared())

ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
watch = Watch()
prepare(pickle.loads(bytes.fromhex(sys.argv[1])), "tokenizer", watch)
print(json.dumps(watch.weights))
ray.shutdown()
"""


@pytest.mark.slow
def test_memory_is_bounded_by_the_blocks_in_flight_not_by_the_corpus(prepare_job: PrepareSpec, tmp_path: Path) -> None:
    """1.6 GB of images go through a driver and two workers that together grow by less than 100 MB."""
    rows, _ = rows_of(prepare_job)
    Image.frombytes("RGB", (400, 400), os.urandom(400 * 400 * 3)).save(tmp_path / "big.bmp")
    big = [{**row, "image": "big.bmp"} for row in rows] * 85  # 3,400 rows × 480 kB
    (tmp_path / "rows.json").write_text(json.dumps(big))
    corpus = prepare_job.corpus.model_copy(update={"samples_per_block": 100})
    spec = dataclasses.replace(
        prepare_job, corpus=corpus, places=((str(tmp_path / "rows.json"), str(tmp_path)),), output=str(tmp_path / "out")
    )
    run = subprocess.run(
        [sys.executable, "-c", WATCHED, pickle.dumps(spec).hex()],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    weights = json.loads(run.stdout.splitlines()[-1])
    assert len(weights) == 34
    assert max(weights[4:]) - weights[3] < 100e6, "30 further blocks cost no more memory than the first"
