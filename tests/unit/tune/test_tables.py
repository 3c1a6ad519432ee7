"""The progress table shows running trials and those that finished last."""

from raylava.tune.tables import progress_table
from raylava.tune.tracker import TrialStatus


def render(trials: list[TrialStatus], planned_trials: int | None) -> tuple[list[list[str]], str]:
    """Return the rows and the caption of the progress table."""
    table = progress_table(trials, now=100.0, planned_trials=planned_trials)
    columns = [list(column.cells) for column in table.columns]
    return [list(map(str, row)) for row in zip(*columns, strict=True)], str(table.caption)


def test_progress_table_shows_stage_step_metrics_and_time_left_of_each_trial() -> None:
    running = TrialStatus("lr=0.1", "finetune", 50, 100, {"loss": 0.25, "tokens/s": 18130.4}, first_report=(80.0, 30.0))
    rows, caption = render([running, TrialStatus("lr=0.2", outcome="stopped")], 12)
    assert rows == [
        ["0", "lr=0.1", "finetune", "50/100", "loss 0.250  18,130 tokens/s", "50 s"],
        ["1", "lr=0.2", "stopped", "", "", ""],
    ]
    assert caption == "1 running, 1 stopped, 10 pending"


def test_progress_table_of_many_trials_shows_the_running_and_the_last_finished_ones() -> None:
    trials = [TrialStatus(f"lr={number}", outcome="done") for number in range(99)] + [TrialStatus("lr=99")]
    rows, caption = render(trials, None)
    assert [row[0] for row in rows] == [str(number) for number in range(76, 100)]
    assert caption == "99 done, 1 running"
