"""Killing the processes of a preparation loses no finished block and changes no byte of the result."""

import dataclasses
from pathlib import Path

import psutil
import pytest

from raylava.config.recipe import Source
from raylava.corpus.prepare import prepare
from raylava.corpus.shards import PrepareSpec
from raylava.progress import NullProgressBar
from tests.support.corpora import file_tree, prepare_serially, with_settings
from tests.support.prepare_process import start_prepare, wait_for_records


def repeated(spec: PrepareSpec, output: Path, samples_per_block: int) -> PrepareSpec:
    """Return a spec over 400 rows, 10 copies of each, so that a test can interrupt it."""
    sources = (Source(annotations="a", sampling_weight=10.0),)
    return with_settings(spec, output, samples_per_block=samples_per_block, sources=sources)


@pytest.mark.usefixtures("ray_cluster")
def test_rerun_after_sigkill_keeps_finished_blocks_and_gives_the_same_bytes(
    prepare_spec: PrepareSpec, tmp_path: Path
) -> None:
    killed = repeated(prepare_spec, tmp_path / "killed", samples_per_block=2)
    prepare_serially(dataclasses.replace(killed, output=str(tmp_path / "uninterrupted")))
    process = start_prepare(killed)
    records = tmp_path / "killed" / "rows"
    wait_for_records(records, process)
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        member.kill()  # SIGKILL to the driver and its Ray processes
    process.wait()
    names = [record.name for record in records.glob("record-*.json")]
    assert 5 <= len(names) < 200, "the run was killed before it finished"

    def modification_times() -> dict[str, int]:
        blocks = tmp_path / "killed" / "blocks"
        files = {name: blocks / name.replace("record", "block").replace("json", "arrow") for name in names}
        return {name: file.stat().st_mtime_ns for name, file in files.items()}

    before = modification_times()
    prepare(killed, "tokenizer", NullProgressBar())
    assert file_tree(tmp_path / "killed") == file_tree(tmp_path / "uninterrupted")
    assert modification_times() == before, "finished blocks are not written again"


def test_killed_workers_do_not_change_the_result(prepare_spec: PrepareSpec, tmp_path: Path) -> None:
    interrupted = repeated(prepare_spec, tmp_path / "interrupted", samples_per_block=4)
    prepare_serially(dataclasses.replace(interrupted, output=str(tmp_path / "uninterrupted")))
    process = start_prepare(interrupted)
    wait_for_records(tmp_path / "interrupted" / "rows", process)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "MapWorker" in " ".join(child.cmdline())]
    assert workers
    for worker in workers:
        worker.kill()
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error[-3000:]
    assert file_tree(tmp_path / "interrupted") == file_tree(tmp_path / "uninterrupted")
