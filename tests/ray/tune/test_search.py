"""A search under Ray Tune prepares its corpus once, stops poor trials early and, run again, starts no trial."""

from collections import Counter
from pathlib import Path

import pytest

from raylava.artifacts import Artifact
from raylava.storage import storage_path
from raylava.tune.report import write_report
from raylava.tune.results import SweepResults
from raylava.tune.runner import SweepRun
from tests.support.sweeps import (
    SMALL_RECIPE,
    count_builds,
    run_sweep,
    wait_until_no_placement_group_is_left,
    write_base_recipe,
    write_sweep,
)

SEARCH = {
    "space": {"finetune.lr": {"loguniform": [1e-5, 1e-1]}, "finetune.warmup_ratio": {"uniform": [0.0, 0.3]}},
    "objective": {"loss": "min"},
    "asha": {"grace": 0.1, "reduction": 2},
    "trials": 5,
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def finished_search(toy_assets: Artifact, storage: Path, ray_cluster: None) -> tuple[SweepRun, SweepResults]:
    """Run the trials of a search one at a time, so that each is compared with all before it."""
    write_base_recipe(storage, toy_assets, SMALL_RECIPE)
    settings = {"pretrain.enabled": False, "finetune.epochs": 4, "finetune.global_batch_size": 12, "evaluate": []}
    return run_sweep(write_sweep(storage, "rates", search=SEARCH, set=settings, max_concurrent_trials=1), storage)


def test_search_prepares_once_and_stops_poor_trials_early(
    finished_search: tuple[SweepRun, SweepResults],
) -> None:
    run, results = finished_search
    builds = count_builds(run, results)
    assert max(builds.values()) == 1
    assert sum("/finetune/" in path for path in builds) == 5
    assert sum("/prepare/" in path for path in builds) == 1
    outcomes = Counter(row.trial.outcome for row in results.rows)
    assert outcomes["done"] + outcomes["stopped"] == 5
    assert outcomes["stopped"] >= 1, outcomes
    worst = max(row.objectives["loss"] for row in results.rows if row.objectives)
    stopped = [row.trial.record for row in results.rows if row.trial.outcome == "stopped"]
    assert all(record and min(record.losses.values()) > 0 for record in stopped)
    assert results.best_rows[0].objectives["loss"] <= worst


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
