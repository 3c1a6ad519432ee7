"""A search's budget counts time and money over all of its runs."""

import json
from pathlib import Path

from raylava.storage import storage_path
from raylava.tune.budget import SearchBudget


def test_search_budget_continues_from_the_time_spent_by_earlier_runs(tmp_path: Path) -> None:
    file = storage_path(tmp_path / "spent.json")
    assert not SearchBudget(file, 1.0).exhausted()
    assert json.loads(file.read_bytes())["seconds"] >= 0.0
    file.write_bytes(json.dumps({"seconds": 3599.999}).encode())
    assert SearchBudget(file, 2.0).spent_seconds >= 3599.999
    assert not SearchBudget(file, 2.0).exhausted()
    assert SearchBudget(file, 0.9).exhausted()


def test_search_without_a_limit_is_never_exhausted_and_writes_no_file(tmp_path: Path) -> None:
    budget = SearchBudget(storage_path(tmp_path / "spent.json"), None)
    budget.add_device_hours(1000.0)
    assert not budget.exhausted()
    assert not (tmp_path / "spent.json").exists()


def test_money_spent_by_trials_of_all_runs_ends_a_search(tmp_path: Path) -> None:
    file = storage_path(tmp_path / "spent.json")
    first = SearchBudget(file, None, max_cost=10.0, price=2.0)
    first.add_device_hours(3.0)
    assert not first.exhausted()
    second = SearchBudget(file, None, max_cost=10.0, price=2.0)
    assert second.cost == 6.0
    second.add_device_hours(2.0)
    assert second.exhausted()
    assert not SearchBudget(file, None, max_cost=11.0, price=2.0).exhausted(), "a larger budget extends the search"
