"""Orders of large corpora and their lengths are memory-mapped files, with the content of those kept in memory."""

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raylava.corpus import shuffle
from raylava.corpus.blocks import LENGTHS, Lengths, encode_lengths, map_lengths
from raylava.corpus.shuffle import Shuffle, ShuffleWindows
from raylava.train import batch_plan
from raylava.train.batch_plan import BatchPlan, worst_case_packs


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "raylava" / "orders"


IMAGES = (np.random.default_rng(0).random(400) < 0.8).astype(np.int32)
WINDOWS = ShuffleWindows(rows=(40,) * 10, bytes=(10,) * 10, window_bytes=30)


@pytest.mark.parametrize("windows", [None, WINDOWS], ids=["whole", "windows"])
@pytest.mark.parametrize("images", [None, IMAGES], ids=["mixed", "by modality"])
def test_order_from_the_shared_file_equals_the_computed_one(
    windows: ShuffleWindows | None, images: np.ndarray | None, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = Shuffle(400, 3, 16, windows, images)
    computed = [order.order(epoch) for epoch in range(2)]
    assert not cache_folder.exists()
    monkeypatch.setattr(shuffle, "_SHARED_SAMPLES", 100)
    for epoch, expected in enumerate(computed):
        shared = order.order(epoch)
        assert isinstance(shared.samples, np.memmap)
        assert np.array_equal(shared.samples, expected.samples)
        assert shared.remainder == expected.remainder
    assert len(list(cache_folder.glob("*.npy"))) == 2


def test_order_is_computed_once_on_a_node_and_anew_for_other_settings(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle, "_SHARED_SAMPLES", 100)
    computed: list[int] = []
    compute = Shuffle._compute
    monkeypatch.setattr(Shuffle, "_compute", lambda self, epoch: computed.append(self.seed) or compute(self, epoch))
    for seed in (0, 0, 1, 0):
        Shuffle(400, seed, 16).order(0)
    assert computed == [0, 1]


def test_plan_of_a_large_corpus_keeps_no_array_of_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "_SHARED_SAMPLES", 100)
    plan = BatchPlan(2_000_000, 1000, epochs=1, seed=0)
    next(plan.from_step(0))  # writes the file
    tracemalloc.start()
    steps = sum(1 for _ in plan.from_step(0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert steps == 2000
    assert peak < 1e6


def test_lengths_are_memory_mapped(tmp_path: Path) -> None:
    lengths = Lengths(*(np.arange(start, start + 1000, dtype=np.int32) for start in (1, 2, 3)))
    (tmp_path / LENGTHS).write_bytes(encode_lengths(lengths))
    allocated = pa.total_allocated_bytes()
    mapped = map_lengths(tmp_path / LENGTHS)
    assert pa.total_allocated_bytes() == allocated, "nothing is copied"
    assert not mapped.length.flags.owndata
    for name in ("length", "images", "loss_tokens"):
        assert np.array_equal(getattr(mapped, name), getattr(lengths, name))


def test_worst_case_packs_are_found_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    lengths = Lengths(*(rng.integers(1, 900, 5000).astype(np.int32) for _ in range(3)))
    monkeypatch.setattr(batch_plan, "_MAX_CANDIDATES", 500)
    whole = worst_case_packs(lengths, 2048, 64)
    monkeypatch.setattr(batch_plan, "_PART", 700)
    assert worst_case_packs(lengths, 2048, 64) == whole
