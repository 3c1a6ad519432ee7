"""A sweep under Ray Tune builds each shared stage once, and a failed variant does not stop the others."""

import re
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from raylava.artifacts import Artifact
from raylava.cli import main
from raylava.config.load import load_recipe
from raylava.config.recipe import Model
from raylava.console import Console
from raylava.models.registry import VisionSpec
from raylava.storage import storage_path
from raylava.toy.demo import recipes_folder
from raylava.tune.report import write_report
from raylava.tune.results import SweepResults
from raylava.tune.runner import SweepRun
from raylava.tune.sweep import load_sweep
from raylava.tune.sweep_plan import plan_of_results
from tests.support.sweeps import SMALL_RECIPE, write_sweep, write_sweep_with_broken_model


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def sweep_file(toy_assets: Artifact, storage: Path, toy_model: Model) -> str:
    return write_sweep_with_broken_model(storage, toy_assets, toy_model)


def run_sweep(sweep_file: str, storage: Path, *overrides: str) -> tuple[SweepRun, SweepResults]:
    """Run a sweep as the command does; its terminal output is appended to console.txt."""
    run = SweepRun(load_sweep(sweep_file), list(overrides), storage_path(storage))
    with (storage / "console.txt").open("a") as stream:
        trials = run.run(Console(stream))
    return run, SweepResults(run.sweep, overrides, plan_of_results(trials, storage_path(storage)), trials)


@pytest.fixture(scope="module")
def finished_sweep(sweep_file: str, storage: Path, ray_cluster: None) -> tuple[SweepRun, SweepResults]:
    return run_sweep(sweep_file, storage)


@pytest.fixture(scope="module")
def run(finished_sweep: tuple[SweepRun, SweepResults]) -> SweepRun:
    return finished_sweep[0]


@pytest.fixture(scope="module")
def results(finished_sweep: tuple[SweepRun, SweepResults]) -> SweepResults:
    return finished_sweep[1]


def count_builds(run: SweepRun, results: SweepResults) -> Counter[str]:
    """Return how often a trial started to build each artifact, by its storage path."""
    paths = [{stage.label: str(stage.spec().path) for stage in stages} for stages in results.plan.stages]
    return Counter(
        trial_paths[label]
        for trial_paths, status in zip(paths, run.trial_statuses, strict=True)
        for label in status.built_stages
    )


def active_placement_groups() -> list[dict[str, Any]]:
    return [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


def wait_until_no_placement_group_is_left(seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while active_placement_groups():
        assert time.monotonic() < deadline, f"placement groups leaked: {active_placement_groups()}"
        time.sleep(0.2)


def test_each_distinct_stage_is_built_by_one_trial(run: SweepRun, results: SweepResults) -> None:
    builds = count_builds(run, results)
    assert set(builds.values()) == {1}
    assert len(builds) == 9, "two corpora, two connectors, three models (one has no connector), two evaluations"


def test_finished_trials_leave_no_placement_group(run: SweepRun) -> None:
    wait_until_no_placement_group_is_left()


def test_failed_variant_reports_its_reason_and_the_others_finish(results: SweepResults, storage: Path) -> None:
    rows = results.table()
    assert [(row["language"], row["outcome"], row["final_loss"] is not None) for row in rows] == [
        ("sound", "done", True),
        ("sound", "done", True),
        ("broken", "failed", False),
        ("broken", "failed", False),
    ]
    reasons = [row["failure"] for row in rows if row["failure"]]
    assert all(
        "1 consecutive steps had a non-finite loss or gradient, the last is step 0" in reason for reason in reasons
    ), reasons
    assert "2 done, 2 failed" in (storage / "console.txt").read_text()


def test_report_has_scores_effects_failures_and_a_command_for_each_row(results: SweepResults, storage: Path) -> None:
    write_report(results, storage_path(storage / "out"))
    text = (storage / "out" / "report.md").read_text()
    scores = [results.rows[number].scores["heldout"] for number in (0, 1)]
    rows = [line for line in text.splitlines() if line.startswith("| sound | ")]
    assert [row.split(" | ")[2] for row in rows[:2]] == [f"{score:.3f}" for score in scores]
    assert "| broken | random | failed | 0 |" in text
    assert f"| connector | random | pretrained | {scores[1] - scores[0]:+.3f} | " in text
    assert "- language=broken connector=random: " in text
    command = next(line for line in text.splitlines() if line.startswith("raylava run") and "broken" not in line)
    recipe, *settings = shlex.split(command)[2:]
    assert load_recipe(recipe, settings).fingerprint_fields() == results.plan.variants[0].recipe.fingerprint_fields()
    header = (storage / "out" / "results.csv").read_text().splitlines()[0]
    assert header.startswith("language,connector,heldout,final_loss,outcome,failure,device_hours,shared_device_hours,")


def test_html_report_is_self_contained_and_has_the_content_of_the_markdown_report(
    results: SweepResults, storage: Path
) -> None:
    write_report(results, storage_path(storage / "out"))
    page = (storage / "out" / "report.html").read_text()
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="http', page), "it must open without network access"
    assert "Finetuning loss" in page
    assert "<td>pretrained</td>" in page


def test_device_hours_account_for_shared_stages(results: SweepResults) -> None:
    first, second = results.rows[:2]
    assert first.device_hours == first.shared_device_hours > second.device_hours > 0, (
        "no other variant uses the first one's connector"
    )
    assert results.total_device_hours == pytest.approx(sum(row.device_hours for row in results.rows))


def test_rerun_of_a_sweep_builds_only_missing_stages(sweep_file: str, run: SweepRun, storage: Path) -> None:
    rerun, _ = run_sweep(sweep_file, storage)
    assert [status.built_stages for status in rerun.trial_statuses] == [[], [], ["pretrain"], ["finetune"]]


@pytest.mark.usefixtures("ray_cluster")
def test_toy_ablation_grid_builds_each_distinct_fingerprint_exactly_once(
    toy_assets: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy").symlink_to(toy_assets.path.path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)  # the sweep refers to ./toy, as created by `raylava toy toy`
    small = [*SMALL_RECIPE[:2], "finetune.max_steps=1", "resources.workers=1", "evaluate=[]"]
    shipped = yaml.safe_load((recipes_folder() / "toy-ablations.yaml").read_text())
    one_seed = shipped | {"recipe": str(recipes_folder() / shipped["recipe"]), "seeds": [0]}  # two take twice as long
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(one_seed))
    run, results = run_sweep(str(tmp_path / "sweep.yaml"), tmp_path, *small)
    builds = count_builds(run, results)
    assert [row.trial.outcome for row in results.rows] == ["done"] * 8
    assert set(builds.values()) == {1}
    kinds = Counter(path.split("/")[-2] for path in builds)
    assert kinds == {"prepare": 2, "pretrain": 4, "finetune": 8}
    stages = results.plan.planned_stages
    assert set(builds) == {str(storage_path(tmp_path) / stage.stage / stage.fingerprint) for stage in stages}


SEARCH = {
    "space": {"finetune.lr": {"loguniform": [1e-5, 1e-1]}, "finetune.warmup_ratio": {"uniform": [0.0, 0.3]}},
    "objective": {"loss": "min"},
    "asha": {"grace": 0.1, "reduction": 2},
    "trials": 6,
}


@pytest.fixture(scope="module")
def finished_search(sweep_file: str, storage: Path, ray_cluster: None) -> tuple[SweepRun, SweepResults]:
    """Run the trials of a search one at a time, so that each is compared with all before it."""
    settings = {"finetune.epochs": 4, "finetune.global_batch_size": 12, "evaluate": []}
    return run_sweep(write_sweep(storage, "rates", search=SEARCH, set=settings, max_concurrent_trials=1), storage)


def test_search_pretrains_once_and_stops_poor_trials_early(finished_search: tuple[SweepRun, SweepResults]) -> None:
    run, results = finished_search
    builds = count_builds(run, results)
    assert max(builds.values()) == 1
    assert sum("/finetune/" in path for path in builds) == 6
    assert sum("/pretrain/" in path for path in builds) <= 1
    outcomes = Counter(row.trial.outcome for row in results.rows)
    assert outcomes["done"] + outcomes["stopped"] == 6
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


@pytest.mark.usefixtures("sweep_file", "ray_cluster")
def test_sweep_command_with_a_failed_trial_exits_with_an_error(
    storage: Path, vision: VisionSpec, capfd: pytest.CaptureFixture[str]
) -> None:
    axes = {"rows": {"short": {"corpora.instruction.max_length": vision.image_tokens + 1}}}
    file = write_sweep(storage, "short", axes=axes, set={"pretrain.enabled": False, "evaluate": []})
    assert main(["sweep", file, "--storage", str(storage)]) == 1
    output = capfd.readouterr().err
    assert "1 of 1 trials failed, the first: " in output
    assert "48 of 48 rows were quarantined" in output
    assert (storage / "sweeps" / "short" / "report.html").exists()
