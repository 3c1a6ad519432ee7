"""A sweep under Ray Tune: what its variants share is made once, one that fails does not stop the others."""

import json
import shlex
import shutil
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from raylava.artifacts import Artifact
from raylava.console import Console
from raylava.demo import micro_recipe
from raylava.recipe import Model, Resources
from raylava.recipe_file import load_recipe
from raylava.storage import place
from raylava.tune.plan import SweepPlan, plan
from raylava.tune.report import write_results
from raylava.tune.runner import Ended, concurrent_trials, run_sweep
from raylava.tune.sweep import load_sweep
from raylava.tune.table import results, results_csv
from raylava.tune.variants import variants

SMALL = [
    "pretrain.global_batch=40",
    "finetune.global_batch=48",
    "finetune.epochs=1",
    "resources.workers=1",
    "evaluate.0.baselines=[]",
    "evaluate.0.batch_size=10",
]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def sweep_plan(lab: Artifact, storage: Path, micro_model: Model) -> SweepPlan:
    """With and without a pretrained connector, on a sound language model and on one with a NaN in its embedding."""
    broken = storage / "broken-gemma"
    shutil.copytree(micro_model.language.name, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][7, 3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    (storage / "base.yaml").write_text(json.dumps(micro_recipe(lab.place, SMALL).model_dump(mode="json")))
    sweep = {
        "name": "small",
        "recipe": "base.yaml",
        "set": {"finetune.stop_after_skipped": 1, "pretrain.stop_after_skipped": 1},
        "axes": {
            "language": {
                "sound": {"model.language.name": micro_model.language.name},
                "broken": {"model.language.name": str(broken)},
            },
            "connector": {"pretrained": {"pretrain.enabled": True}, "random": {"pretrain.enabled": False}},
        },
    }
    (storage / "sweep.yaml").write_text(json.dumps(sweep))
    return plan(variants(load_sweep(str(storage / "sweep.yaml")), []), place(storage))


@pytest.fixture(scope="module")
def ended(sweep_plan: SweepPlan, storage: Path, ray_cluster: None) -> list[Ended]:
    with (storage / "told.txt").open("w") as stream:
        return run_sweep(sweep_plan, place(storage), None, Console(stream))


def test_the_plan_says_what_variants_share_before_anything_runs(sweep_plan: SweepPlan) -> None:
    works = Counter((work.label, work.users) for work in sweep_plan.works)
    assert works == {
        ("prepare alignment", 2): 1,
        ("pretrain", 1): 2,
        ("prepare instruction", 4): 1,
        ("finetune", 1): 4,
        ("evaluate heldout", 1): 4,
    }


@pytest.mark.slow
def test_each_distinct_stage_is_made_by_one_trial(sweep_plan: SweepPlan, ended: list[Ended]) -> None:
    places = [{stage.label: str(stage.draft.place) for stage in stages} for stages in sweep_plan.stages]
    begun = Counter(of[label] for of, trial in zip(places, ended, strict=True) for label in trial.made)
    assert set(begun.values()) == {1}
    assert len(begun) == 9, "two corpora, two connectors, three models (one has no connector), two evaluations"


@pytest.mark.slow
def test_a_variant_that_fails_is_told_with_its_reason_and_the_others_go_on(
    sweep_plan: SweepPlan, ended: list[Ended], storage: Path
) -> None:
    rows = results(sweep_plan, [one.failure for one in ended])
    assert [(row["language"], row["failure"] is None, "final_loss" in row) for row in rows] == [
        ("sound", True, True),
        ("sound", True, True),
        ("broken", False, False),
        ("broken", False, False),
    ]
    reasons = [row["failure"] for row in rows if row["failure"]]
    assert all("1 steps in a row were not finite, the last is step 0" in reason for reason in reasons), reasons
    assert results_csv(rows).decode().splitlines()[0] == "language,connector,heldout,final_loss,model,failure"
    assert "failed" in (storage / "told.txt").read_text()


@pytest.mark.slow
def test_the_report_has_scores_effects_failures_and_a_command_for_each_row(
    sweep_plan: SweepPlan, ended: list[Ended], storage: Path
) -> None:
    sweep = load_sweep(str(storage / "sweep.yaml"))
    write_results(
        sweep, sweep_plan, [one.failure for one in ended], ["evaluate.0.batch_size=5"], place(storage / "out")
    )
    page = (storage / "out" / "report.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| sound | ")]
    scores = [sweep_plan.artifacts(n)["evaluate heldout"].metrics["overall"]["exact_match"] for n in (0, 1)]
    assert [row.split(" | ")[2] for row in rows] == [f"{score:.3f}" for score in scores]
    assert "| broken | random | failed | 0 |" in page
    assert f"| connector | random | pretrained | {scores[1] - scores[0]:+.3f} | " in page
    assert "- language=broken connector=random: " in page
    command = next(line for line in page.splitlines() if line.startswith("raylava run") and "broken" not in line)
    recipe, *settings = shlex.split(command)[2:]
    assert load_recipe(recipe, settings).content() == sweep_plan.variants[0].recipe.content()


@pytest.mark.slow
def test_run_again_a_sweep_makes_only_what_is_missing(sweep_plan: SweepPlan, ended: list[Ended], storage: Path) -> None:
    with (storage / "again.txt").open("w") as stream:
        again = run_sweep(sweep_plan, place(storage), None, Console(stream))
    assert [one.made for one in again] == [(), (), ("pretrain",), ("finetune",)]


def test_as_many_trials_run_at_once_as_the_hungriest_recipe_allows() -> None:
    wanted = [Resources(workers=2, gpus_per_worker=1), Resources(workers=4, gpus_per_worker=1, cpus_per_worker=2)]
    assert concurrent_trials(wanted, {"CPU": 64.0, "GPU": 8.0}) == 2
    assert concurrent_trials(wanted, {"CPU": 9.0, "GPU": 8.0}) == 1
    assert concurrent_trials(wanted, {"CPU": 1.0}) == 1, "an autoscaling cluster may start with nothing"
