"""A sweep under Ray Tune builds each shared stage once, and a failed variant does not stop the others."""

import re
import shlex
from pathlib import Path

import pytest

from raylava.artifacts import Artifact
from raylava.cli import main
from raylava.config.load import load_recipe
from raylava.config.recipe import Model
from raylava.models.registry import VisionSpec
from raylava.storage import storage_path
from raylava.tune.report import write_report
from raylava.tune.results import SweepResults
from raylava.tune.runner import SweepRun
from tests.support.sweeps import (
    count_builds,
    run_sweep,
    wait_until_no_placement_group_is_left,
    write_sweep,
    write_sweep_with_broken_model,
)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def sweep_file(toy_assets: Artifact, storage: Path, toy_model: Model) -> str:
    return write_sweep_with_broken_model(storage, toy_assets, toy_model)


@pytest.fixture(scope="module")
def finished_sweep(sweep_file: str, storage: Path, ray_cluster: None) -> tuple[SweepRun, SweepResults]:
    return run_sweep(sweep_file, storage)


@pytest.fixture(scope="module")
def run(finished_sweep: tuple[SweepRun, SweepResults]) -> SweepRun:
    return finished_sweep[0]


@pytest.fixture(scope="module")
def results(finished_sweep: tuple[SweepRun, SweepResults]) -> SweepResults:
    return finished_sweep[1]


def test_each_distinct_stage_is_built_by_one_trial(run: SweepRun, results: SweepResults) -> None:
    builds = count_builds(run, results)
    assert set(builds.values()) == {1}
    assert len(builds) == 8, "two corpora, a connector, three models of which one fails, and two evaluations"


def test_finished_trials_leave_no_placement_group(run: SweepRun) -> None:
    wait_until_no_placement_group_is_left()


def test_failed_variant_reports_its_reason_and_the_others_finish(results: SweepResults, storage: Path) -> None:
    rows = results.table()
    assert [(row["language"], row["outcome"], row["final_loss"] is not None) for row in rows] == [
        ("sound", "done", True),
        ("sound", "done", True),
        ("broken", "failed", False),
    ]
    reasons = [row["failure"] for row in rows if row["failure"]]
    assert all(
        "1 consecutive steps had a non-finite loss or gradient, the last is step 0" in reason for reason in reasons
    ), reasons


def test_log_of_a_sweep_has_a_line_per_change_of_a_trial_and_its_table_once(
    results: SweepResults, storage: Path
) -> None:
    lines = (storage / "console.txt").read_text().splitlines()
    assert len([line for line in lines if "2 done, 1 failed" in line]) == 1
    changes = [line for line in lines if line.startswith("trial ")]
    assert len(set(changes)) == len(changes) > 3, lines
    ends = [line.rpartition(": ")[2] for line in changes]
    assert (ends.count("done"), ends.count("failed")) == (2, 1)
    assert "finetune" in ends


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
    assert [status.built_stages for status in rerun.trial_statuses] == [[], [], ["finetune"]]


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
