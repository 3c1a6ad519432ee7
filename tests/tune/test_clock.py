"""A search's hours are counted over all its runs, and over is over for fresh trials alone."""

import json
from pathlib import Path

from raylava.storage import storage_path
from raylava.tune.runner import SearchBudget
from raylava.tune.tables import progress_table
from raylava.tune.tracker import TrialStatus


def test_hours_go_on_where_an_earlier_run_ended(tmp_path: Path) -> None:
    file = storage_path(tmp_path / "spent.json")
    assert not SearchBudget(file, 1.0).is_over()
    assert json.loads(file.read_bytes())["seconds"] >= 0.0
    file.write_bytes(json.dumps({"seconds": 3599.999}).encode())
    assert SearchBudget(file, 2.0).spent >= 3599.999
    assert not SearchBudget(file, 2.0).is_over()
    assert SearchBudget(file, 0.9).is_over()


def test_a_search_without_hours_is_never_over_and_keeps_no_file(tmp_path: Path) -> None:
    assert not SearchBudget(storage_path(tmp_path / "spent.json"), None).is_over()
    assert not (tmp_path / "spent.json").exists()


def shown(trials: list[TrialStatus], expected: int | None) -> tuple[list[list[str]], str]:
    table = progress_table(trials, now=100.0, expected=expected)
    cells = [list(column.cells) for column in table.columns]
    return [list(map(str, row)) for row in zip(*cells, strict=True)], str(table.caption)


def test_the_table_tells_stage_step_figures_and_eta_of_each_trial() -> None:
    running = TrialStatus("lr=0.1", "finetune", 50, 100, {"loss": 0.25, "wait": 0.0}, since=(80.0, 30.0))
    rows, caption = shown([running, TrialStatus("lr=0.2", ended="stopped")], 12)
    assert rows == [["0", "lr=0.1", "finetune", "50/100", "loss 0.25", "50 s"], ["1", "lr=0.2", "stopped", "", "", ""]]
    assert caption == "1 running, 1 stopped, 10 to come"


def test_of_very_many_trials_the_table_shows_those_that_run_and_the_last_that_ended() -> None:
    trials = [TrialStatus(f"lr={number}", ended="done") for number in range(99)] + [TrialStatus("lr=99")]
    rows, caption = shown(trials, None)
    assert [row[0] for row in rows] == [str(number) for number in range(76, 100)]
    assert caption == "99 done, 1 running"
