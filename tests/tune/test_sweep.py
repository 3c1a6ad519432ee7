"""A sweep under Ray Tune: what its variants share is made once, one that fails does not stop the others."""

import json
import re
import shlex
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from safetensors.torch import load_file, save_file

from raylava.artifacts import Artifact
from raylava.cli import main
from raylava.config.load import load_recipe
from raylava.config.recipe import Model, Resources
from raylava.console import Console
from raylava.models.registry import VisionSpec
from raylava.storage import storage_path
from raylava.toy.demo import recipes_folder, toy_recipe
from raylava.tune.report import write_report
from raylava.tune.results import SweepResults
from raylava.tune.runner import SweepRun, concurrent_trials
from raylava.tune.sweep import load_sweep
from raylava.tune.sweep_plan import plan, plan_of

SMALL = [
    "pretrain.global_batch_size=40",
    "finetune.global_batch_size=48",
    "finetune.epochs=1",
    "resources.workers=1",
    "evaluate.0.baselines=[]",
    "evaluate.0.batch_size=10",
]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def sweep_file(toy_assets: Artifact, storage: Path, toy_model: Model) -> str:
    """With and without a pretrained connector, on a sound language model and on one with a NaN in its embedding."""
    broken = storage / "broken-gemma"
    shutil.copytree(toy_model.language.name, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][7, 3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    (storage / "base.yaml").write_text(json.dumps(toy_recipe(toy_assets.path, SMALL).model_dump(mode="json")))
    axes = {
        "language": {
            "sound": {"model.language.name": toy_model.language.name},
            "broken": {"model.language.name": str(broken)},
        },
        "connector": {"pretrained": {"pretrain.enabled": True}, "random": {"pretrain.enabled": False}},
    }
    return written(
        storage, "small", axes=axes, set={"finetune.max_consecutive_skips": 1, "pretrain.max_consecutive_skips": 1}
    )


def written(folder: Path, name: str, **settings: Any) -> str:
    """A sweep of the folder's base.yaml."""
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps({"name": name, "recipe": "base.yaml"} | settings))
    return str(file)


def swept(sweep_file: str, storage: Path, *overrides: str) -> tuple[SweepRun, SweepResults]:
    """Run a sweep as the command does. What a person would have seen is in told.txt."""
    run = SweepRun(load_sweep(sweep_file), list(overrides), storage_path(storage))
    with (storage / "told.txt").open("a") as stream:
        ended = run.run(Console(stream))
    return run, SweepResults(run.sweep, overrides, plan_of(ended, storage_path(storage)), ended)


@pytest.fixture(scope="module")
def run_and_findings(sweep_file: str, storage: Path, ray_cluster: None) -> tuple[SweepRun, SweepResults]:
    return swept(sweep_file, storage)


@pytest.fixture(scope="module")
def run(run_and_findings: tuple[SweepRun, SweepResults]) -> SweepRun:
    return run_and_findings[0]


@pytest.fixture(scope="module")
def findings(run_and_findings: tuple[SweepRun, SweepResults]) -> SweepResults:
    return run_and_findings[1]


def builds(run: SweepRun, findings: SweepResults) -> Counter[str]:
    """How often each artifact was set out to be made, by its place."""
    places = [{stage.label: str(stage.spec.path) for stage in stages} for stages in findings.plan.stages]
    return Counter(of[label] for of, trial in zip(places, run.begun, strict=True) for label in trial.made)


def reserved() -> list[dict[str, Any]]:
    """Placement groups that still hold something."""
    return [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


def wait_until_nothing_is_reserved(seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while reserved():
        assert time.monotonic() < until, f"placement groups leaked: {reserved()}"
        time.sleep(0.2)


def test_the_plan_says_what_variants_share_before_anything_runs(sweep_file: str, storage: Path) -> None:
    run = SweepRun(load_sweep(sweep_file), [], storage_path(storage))
    works = Counter((work.label, work.users) for work in plan(run.expected(), storage_path(storage)).works)
    assert works == {
        ("prepare alignment", 2): 1,
        ("pretrain", 1): 2,
        ("prepare instruction", 4): 1,
        ("finetune", 1): 4,
        ("evaluate heldout", 1): 4,
    }


@pytest.mark.slow
def test_each_distinct_stage_is_made_by_one_trial(run: SweepRun, findings: SweepResults) -> None:
    begun = builds(run, findings)
    assert set(begun.values()) == {1}
    assert len(begun) == 9, "two corpora, two connectors, three models (one has no connector), two evaluations"


@pytest.mark.slow
def test_trials_leave_no_placement_group_behind(run: SweepRun) -> None:
    wait_until_nothing_is_reserved()


@pytest.mark.slow
def test_a_variant_that_fails_is_told_with_its_reason_and_the_others_go_on(
    findings: SweepResults, storage: Path
) -> None:
    rows = findings.table()
    assert [(row["language"], row["ended"], row["final_loss"] is not None) for row in rows] == [
        ("sound", "done", True),
        ("sound", "done", True),
        ("broken", "failed", False),
        ("broken", "failed", False),
    ]
    reasons = [row["failure"] for row in rows if row["failure"]]
    assert all("1 steps in a row were not finite, the last is step 0" in reason for reason in reasons), reasons
    assert "2 done, 2 failed" in (storage / "told.txt").read_text()


@pytest.mark.slow
def test_the_report_has_scores_effects_failures_and_a_command_for_each_row(
    findings: SweepResults, storage: Path
) -> None:
    write_report(findings, storage_path(storage / "out"))
    text = (storage / "out" / "report.md").read_text()
    scores = [findings.rows[number].scores["heldout"] for number in (0, 1)]
    rows = [line for line in text.splitlines() if line.startswith("| sound | ")]
    assert [row.split(" | ")[2] for row in rows[:2]] == [f"{score:.3f}" for score in scores]
    assert "| broken | random | failed | 0 |" in text
    assert f"| connector | random | pretrained | {scores[1] - scores[0]:+.3f} | " in text
    assert "- language=broken connector=random: " in text
    command = next(line for line in text.splitlines() if line.startswith("raylava run") and "broken" not in line)
    recipe, *settings = shlex.split(command)[2:]
    assert load_recipe(recipe, settings).fingerprint_fields() == findings.plan.variants[0].recipe.fingerprint_fields()
    header = (storage / "out" / "results.csv").read_text().splitlines()[0]
    assert header.startswith("language,connector,heldout,final_loss,ended,failure,")


@pytest.mark.slow
def test_the_page_stands_alone_and_says_what_the_report_says(findings: SweepResults, storage: Path) -> None:
    write_report(findings, storage_path(storage / "out"))
    page = (storage / "out" / "report.html").read_text()
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="http', page), "it must open without network"
    assert "Finetuning loss" in page
    assert "<td>pretrained</td>" in page


@pytest.mark.slow
def test_sharing_is_counted_in_the_cost(findings: SweepResults) -> None:
    first, second = findings.rows[:2]
    assert first.cost == first.share > second.cost > 0, "no other variant uses the first one's connector"
    assert findings.paid == pytest.approx(sum(row.cost for row in findings.rows))


@pytest.mark.slow
def test_run_again_a_sweep_makes_only_what_is_missing(sweep_file: str, run: SweepRun, storage: Path) -> None:
    again, _ = swept(sweep_file, storage)
    assert [one.made for one in again.begun] == [[], [], ["pretrain"], ["finetune"]]


@pytest.mark.slow
def test_the_toy_ablation_grid_builds_each_distinct_fingerprint_exactly_once(
    toy_assets: Artifact, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy").symlink_to(toy_assets.path.path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)  # the sweep names ./micro, as after `raylava toy toy`
    small = [*SMALL[:2], "finetune.max_steps=1", "resources.workers=1", "evaluate=[]"]
    shipped = yaml.safe_load((recipes_folder() / "toy-ablations.yaml").read_text())
    one_seed = shipped | {"recipe": str(recipes_folder() / shipped["recipe"]), "seeds": [0]}  # two take twice as long
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(one_seed))
    run, findings = swept(str(tmp_path / "sweep.yaml"), tmp_path, *small)
    begun = builds(run, findings)
    assert [row.ended.how for row in findings.rows] == ["done"] * 8
    assert set(begun.values()) == {1}
    kinds = Counter(place.split("/")[-2] for place in begun)
    assert kinds == {"prepare": 2, "pretrain": 4, "finetune": 8}
    assert set(begun) == {str(storage_path(tmp_path) / work.stage / work.fingerprint) for work in findings.plan.works}


SEARCH = {
    "space": {"finetune.lr": {"loguniform": [1e-5, 1e-1]}, "finetune.warmup_ratio": {"uniform": [0.0, 0.3]}},
    "objective": {"loss": "min"},
    "asha": {"grace": 0.1, "reduction": 2},
    "trials": 6,
}


@pytest.fixture(scope="module")
def searched(sweep_file: str, storage: Path, ray_cluster: None) -> tuple[SweepRun, SweepResults]:
    """One at a time: each is weighed against all before it."""
    settings = {"finetune.epochs": 4, "finetune.global_batch_size": 12, "evaluate": []}
    return swept(written(storage, "rates", search=SEARCH, set=settings, max_concurrent_trials=1), storage)


@pytest.mark.slow
def test_a_search_pretrains_once_and_stops_the_hopeless_early(searched: tuple[SweepRun, SweepResults]) -> None:
    run, findings = searched
    begun = builds(run, findings)
    assert max(begun.values()) == 1
    assert sum("/finetune/" in place for place in begun) == 6
    assert sum("/pretrain/" in place for place in begun) <= 1
    how = Counter(row.ended.how for row in findings.rows)
    assert how["done"] + how["stopped"] == 6
    assert how["stopped"] >= 1, how
    worst = max(row.values["loss"] for row in findings.rows if row.values)
    stopped = [row.ended.tried for row in findings.rows if row.ended.how == "stopped"]
    assert all(one and min(one.losses.values()) > 0 for one in stopped)
    assert findings.chosen[0].values["loss"] <= worst


@pytest.mark.slow
def test_a_trial_that_was_stopped_holds_nothing_any_more(searched: tuple[SweepRun, SweepResults]) -> None:
    wait_until_nothing_is_reserved()


@pytest.mark.slow
def test_a_finished_search_run_again_begins_nothing(searched: tuple[SweepRun, SweepResults], storage: Path) -> None:
    again, findings = swept(str(storage / "rates.yaml"), storage)
    assert again.begun == []
    assert [row.ended for row in findings.rows] == [row.ended for row in searched[1].rows]


@pytest.mark.slow
def test_the_page_of_a_search_shows_optunas_plots(searched: tuple[SweepRun, SweepResults], storage: Path) -> None:
    write_report(searched[1], storage_path(storage / "out"))
    page = (storage / "out" / "report.html").read_text()
    assert "loss after 10 % of finetuning, trials by their settings" in page
    assert "each setting explains (fANOVA)" in page
    assert "stopped at " in (storage / "out" / "report.md").read_text()


def test_a_sweep_with_a_failed_trial_says_so_in_its_exit_status(
    sweep_file: str, storage: Path, vision: VisionSpec, ray_cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    axes = {"rows": {"short": {"corpora.instruction.max_length": vision.image_tokens + 1}}}
    file = written(storage, "short", axes=axes, set={"pretrain.enabled": False, "evaluate": []})
    assert main(["sweep", file, "--storage", str(storage)]) == 1
    told = capfd.readouterr().err
    assert "1 of 1 trials failed, the first: " in told
    assert "48 of 48 rows had to be set aside" in told
    assert (storage / "sweeps" / "short" / "report.html").exists()


def test_as_many_trials_run_at_once_as_the_hungriest_recipe_allows() -> None:
    wanted = [Resources(workers=2, gpus_per_worker=1), Resources(workers=4, gpus_per_worker=1, cpus_per_worker=2)]
    assert concurrent_trials(wanted, {"CPU": 64.0, "GPU": 8.0}) == 2
    assert concurrent_trials(wanted, {"CPU": 9.0, "GPU": 8.0}) == 1
    assert concurrent_trials(wanted, {"CPU": 1.0}) == 1, "an autoscaling cluster may start with nothing"
