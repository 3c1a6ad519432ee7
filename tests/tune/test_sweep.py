"""A sweep under Ray Tune: what its variants share is made once, one that fails does not stop the others."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from raylava.artifacts import Artifact
from raylava.console import Console
from raylava.demo import micro_recipe
from raylava.recipe import Model, Resources
from raylava.storage import place
from raylava.tune.plan import SweepPlan, plan
from raylava.tune.runner import Ended, concurrent_trials, run_sweep
from raylava.tune.sweep import load_sweep
from raylava.tune.table import results, results_csv
from raylava.tune.variants import variants

SMALL = [
    "pretrain.global_batch=40",
    "finetune.global_batch=48",
    "finetune.epochs=1",
    "resources.workers=1",
    "evaluate=[]",
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
    }


@pytest.mark.slow
def test_each_distinct_stage_is_made_by_one_trial(sweep_plan: SweepPlan, ended: list[Ended]) -> None:
    places = [{stage.label: str(stage.draft.place) for stage in stages} for stages in sweep_plan.stages]
    begun = Counter(of[label] for of, trial in zip(places, ended, strict=True) for label in trial.made)
    assert set(begun.values()) == {1}
    assert len(begun) == 7, "two corpora, two connectors, and three models: one has no connector to start from"


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
    assert results_csv(rows).decode().splitlines()[0] == "language,connector,final_loss,model,failure"
    assert "failed" in (storage / "told.txt").read_text()


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
