"""Variants that differ only in length share their first steps, where the schedule does not depend on the length."""

from pathlib import Path
from typing import Any

import pytest

from raylava.artifacts import Artifact
from raylava.pipeline.graph import build_stages
from raylava.pipeline.stage import Stage
from raylava.pipeline.stages import CONTINUED_FROM, TrainStage
from raylava.storage import storage_path
from raylava.toy.demo import toy_recipe
from raylava.train.step_log import FINAL_STATE
from raylava.tune.prefixes import linked_stages, plan_prefixes, unneeded_states, with_recorded_prefixes

CONSTANT = ("finetune.lr_schedule=constant", "finetune.warmup_ratio=0")


@pytest.fixture
def stages(toy_assets: Artifact, tmp_path: Path) -> Any:
    def build(*overrides: str) -> list[Stage]:
        recipe = toy_recipe(toy_assets.path, ["pretrain.enabled=false", "evaluate=[]", *overrides])
        return build_stages(recipe, storage_path(tmp_path))

    return build


def linked(variants: list[list[Stage]]) -> list[list[Stage]]:
    return linked_stages(variants, plan_prefixes(variants))


def labels(stages: list[Stage]) -> list[str]:
    return [stage.label for stage in stages]


def spec(stage: Stage) -> Any:
    assert isinstance(stage, TrainStage)
    return stage.train_spec()


def test_longer_variant_continues_from_each_shorter_one(stages: Any) -> None:
    three, one, two = linked([stages(*CONSTANT, f"finetune.epochs={count}") for count in (3, 1, 2)])
    assert labels(one) == ["prepare instruction", "finetune"]
    assert labels(two) == ["prepare instruction", "finetune (first 1 epochs)", "finetune"]
    first, second = "finetune (first 1 epochs)", "finetune (first 2 epochs)"
    assert labels(three) == ["prepare instruction", first, second, "finetune"]
    assert [stage.spec().fingerprint for stage in three[1:3]] == [one[1].spec().fingerprint, two[2].spec().fingerprint]
    assert [spec(stage).keep_final_state for stage in three[1:]] == [True, True, False]
    assert spec(one[1]).keep_final_state, "whichever trial builds it"
    assert spec(two[-1]).keep_final_state


def test_state_is_used_while_it_is_kept(stages: Any) -> None:
    one, two = linked([stages(*CONSTANT, f"finetune.epochs={count}") for count in (1, 2)])
    assert spec(two[-1]).initial_state is None, "the shorter stage is still to be built"
    state = two[1].spec().path / FINAL_STATE
    (state / "checkpoint.json").write_bytes(b"{}")
    assert spec(two[-1]).initial_state == state.uri
    assert spec(two[1]).initial_state is None
    one[1].spec().commit({}, {}, 1.0)
    assert unneeded_states([one, two]) == []
    two[-1].spec().commit({}, {}, 1.0)
    (prefix,) = unneeded_states([one, two])
    prefix.delete_final_state()
    assert not state.exists()
    assert unneeded_states([one, two]) == []


def test_state_that_a_killed_driver_left_is_removed_by_the_next_run(stages: Any) -> None:
    one, two = (stages(*CONSTANT, f"finetune.epochs={count}") for count in (1, 2))
    (one[1].spec().path / FINAL_STATE / "checkpoint.json").write_bytes(b"{}")
    for variant in (one, two):
        variant[1].spec().commit({}, {}, 1.0)
    assert [stage.length for stage in unneeded_states([one, two])] == [1]


def test_shorter_stage_whose_state_was_not_kept_is_no_prefix(stages: Any) -> None:
    one, two = (stages(*CONSTANT, f"finetune.epochs={count}") for count in (1, 2))
    one[1].spec().commit({}, {}, 1.0)
    assert [labels(variant)[1:] for variant in linked([one, two])] == [["finetune"], ["finetune"]]


def test_complete_stage_waits_for_no_prefix(stages: Any) -> None:
    one, two = (stages(*CONSTANT, f"finetune.epochs={count}") for count in (1, 2))
    two[1].spec().commit({}, {}, 1.0)
    assert [labels(variant)[1:] for variant in linked([one, two])] == [["finetune"], ["finetune"]]
    assert plan_prefixes([one, two]).extended == frozenset()


def test_report_follows_what_stages_recorded_and_not_the_plan(stages: Any) -> None:
    one, two, three = (stages(*CONSTANT, f"finetune.epochs={count}") for count in (1, 2, 3))
    one[1].spec().commit({}, {}, 1.0)
    two[1].spec().commit({CONTINUED_FROM: one[1].spec().fingerprint}, {}, 1.0)
    three[1].spec().commit({}, {}, 1.0)  # trained from the start
    shown = with_recorded_prefixes([one, two, three])
    expected = [["finetune"], ["finetune (first 1 epochs)", "finetune"], ["finetune"]]
    assert [labels(variant)[1:] for variant in shown] == expected


def test_variants_that_differ_in_max_steps_share_steps(stages: Any) -> None:
    short, long = linked([stages(*CONSTANT, f"finetune.max_steps={count}") for count in (4, 9)])
    assert labels(short)[1:] == ["finetune"]
    assert labels(long)[1:] == ["finetune (first 4 steps)", "finetune"]


def test_fingerprints_do_not_depend_on_sharing(stages: Any) -> None:
    alone = stages(*CONSTANT, "finetune.epochs=2")
    _, shared = linked([stages(*CONSTANT, "finetune.epochs=1"), alone])
    assert shared[-1].spec().fingerprint == alone[-1].spec().fingerprint


@pytest.mark.parametrize(
    "overrides",
    [
        ("finetune.lr_schedule=cosine", "finetune.warmup_ratio=0"),
        ("finetune.lr_schedule=constant", "finetune.warmup_ratio=0.1"),
        (*CONSTANT, "finetune.checkpoint={interval_steps: 2, keep_best: true}"),
    ],
)
def test_nothing_is_shared_where_the_first_steps_depend_on_the_length(overrides: tuple[str, ...], stages: Any) -> None:
    variants = linked([stages(*overrides, f"finetune.epochs={count}") for count in (1, 2)])
    assert [labels(variant)[1:] for variant in variants] == [["finetune"], ["finetune"]]
    assert not any(spec(variant[-1]).keep_final_state for variant in variants)


@pytest.mark.parametrize("override", ["seed=1", "finetune.lr=1e-4", "finetune.zero.stage=1"])
def test_nothing_is_shared_between_variants_that_differ_otherwise(override: str, stages: Any) -> None:
    variants = linked([stages(*CONSTANT, "finetune.epochs=1"), stages(*CONSTANT, "finetune.epochs=2", override)])
    assert [labels(variant)[1:] for variant in variants] == [["finetune"], ["finetune"]]
