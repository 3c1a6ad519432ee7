"""The search budget counts time over all runs."""

import json
from pathlib import Path

from raylava.storage import storage_path
from raylava.tune.runner import SearchBudget


def test_search_budget_continues_from_the_time_spent_by_earlier_runs(tmp_path: Path) -> None:
    file = storage_path(tmp_path / "spent.json")
    assert not SearchBudget(file, 1.0).exhausted()
    assert json.loads(file.read_bytes())["seconds"] >= 0.0
    file.write_bytes(json.dumps({"seconds": 3599.999}).encode())
    assert SearchBudget(file, 2.0).spent_seconds >= 3599.999
    assert not SearchBudget(file, 2.0).exhausted()
    assert SearchBudget(file, 0.9).exhausted()


def test_search_budget_without_hours_is_never_exhausted_and_writes_no_file(tmp_path: Path) -> None:
    assert not SearchBudget(storage_path(tmp_path / "spent.json"), None).exhausted()
    assert not (tmp_path / "spent.json").exists()
