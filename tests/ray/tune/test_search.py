"""A search under Ray Tune compares a trial with those of earlier runs, stops it early and, run again, starts no trial.

tests/chaos/tune has a search whose trials finish.
"""

from pathlib import Path

import pytest

from raylava.artifacts import Artifact
from raylava.storage import storage_path
from raylava.tune.report import write_report
from raylava.tune.results import SweepResults
from raylava.tune.runner import SweepRun
from raylava.tune.study import RUNGS
from raylava.tune.sweep import load_sweep
from tests.support.sweeps import (
    SMALL_RECIPE,
    run_sweep,
    wait_until_no_placement_group_is_left,
    write_base_recipe,
    write_sweep,
)

SEARCH = {
    "space": {"finetune.lr": {"loguniform": [1e-5, 1e-1]}, "finetune.warmup_ratio": {"uniform": [0.0, 0.3]}},
    "objective": {"loss": "min"},
    "early_stopping": {"grace": 0.1, "reduction": 2},
    "trials": 6,
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def finished_search(toy_assets: Artifact, storage: Path, ray_cluster: None) -> tuple[SweepRun, SweepResults]:
    """Run the last two of six trials; the study has four with smaller losses than training can reach."""
    write_base_recipe(storage, toy_assets, SMALL_RECIPE)
    settings = {"pretrain.enabled": False, "finetune.epochs": 4, "finetune.global_batch_size": 12, "evaluate": []}
    file = write_sweep(storage, "rates", search=SEARCH, set=settings, max_concurrent_trials=1)
    record_trials(file, storage, losses=[0.001, 0.002, 0.003, 0.004])
    return run_sweep(file, storage)


def record_trials(file: str, storage: Path, losses: list[float]) -> None:
    """Record finished trials in the study of a sweep's only variant, as an earlier run would have done."""
    run = SweepRun(load_sweep(file), [], storage_path(storage))
    assert run.sweep.search
    (study,) = run._studies(run.sweep.search).resume_studies(run._variants)
    for number, loss in enumerate(losses):
        assert study.next_settings(f"recorded-{number}", allow_new=True)
        for rung in range(1, RUNGS + 1):
            study.record_loss(f"recorded-{number}", rung, loss)
        study.on_trial_complete(f"recorded-{number}", {"objective/loss": loss})


def test_trial_worse_than_those_of_earlier_runs_is_stopped_early(
    finished_search: tuple[SweepRun, SweepResults],
) -> None:
    run, results = finished_search
    assert [status.built_stages for status in run.trial_statuses] == [["prepare instruction", "finetune"], ["finetune"]]
    assert [row.trial.outcome for row in results.rows] == ["done"] * 4 + ["stopped"] * 2, (
        "a trial follows one that was stopped"
    )
    assert results.best_rows[0].objectives["loss"] == 0.001
    record = results.rows[-1].trial.record
    assert record
    assert 1 <= len(record.losses) < RUNGS
    assert min(record.losses.values()) > 0.004


def test_trial_stopped_early_leaves_no_placement_group(finished_search: tuple[SweepRun, SweepResults]) -> None:
    wait_until_no_placement_group_is_left()


def test_rerun_of_a_finished_search_starts_no_trial(
    finished_search: tuple[SweepRun, SweepResults], storage: Path
) -> None:
    rerun, results = run_sweep(str(storage / "rates.yaml"), storage)
    assert rerun.trial_statuses == []
    assert [row.trial for row in results.rows] == [row.trial for row in finished_search[1].rows]


def test_html_report_of_a_search_shows_optuna_plots(
    finished_search: tuple[SweepRun, SweepResults], storage: Path
) -> None:
    write_report(finished_search[1], storage_path(storage / "out"))
    page = (storage / "out" / "report.html").read_text()
    assert "loss after 10 % of finetuning: trials by their settings" in page
    assert "explained by each setting (fANOVA)" in page
    assert "stopped at " in (storage / "out" / "report.md").read_text()
