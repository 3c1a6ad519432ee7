"""A study remembers what a search tried, whoever asks; what was stopped early or failed is told as that."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from raylava.errors import UserError
from raylava.storage import StoragePath, storage_path
from raylava.toy.demo import recipes_folder
from raylava.tune.searcher import SingleTrial, Source, SweepSearcher
from raylava.tune.study import RUNGS, StorageJournal, Studies, VariantSearch, drawn
from raylava.tune.sweep import Search, Sweep
from raylava.tune.trial import Rungs
from raylava.tune.variants import Variant, variants, with_settings

SPACE = {"finetune.lr": {"loguniform": [1e-6, 1e-4]}, "finetune.epochs": {"int": [1, 3]}}


def search(**settings: Any) -> Search:
    return Search.model_validate({"space": SPACE, "objective": {"loss": "min"}, "trials": 4} | settings)


def sweep(**settings: Any) -> Sweep:
    return Sweep(name="rates", recipe=str(recipes_folder() / "llava-gemma-2b.yaml"), **settings)


@pytest.fixture
def variant() -> Variant:
    return variants(sweep(), [])[0]


@pytest.fixture
def folder(tmp_path: Path) -> StoragePath:
    return storage_path(tmp_path)


def studies(folder: StoragePath, **settings: Any) -> Studies:
    return Studies(search(**settings), "rates", folder, lambda variant: variant.recipe.fingerprint_fields())


def driver(variant: Variant, folder: StoragePath, **settings: Any) -> VariantSearch:
    """What a driver opens, each time anew from what lies in the folder."""
    (only,) = studies(folder, **settings).take([variant])
    return only


def ends(loss: float) -> dict[str, Any]:
    return {"objective/loss": loss}


def test_a_second_driver_knows_what_the_first_tried_and_hands_out_only_what_is_due(
    variant: Variant, folder: StoragePath
) -> None:
    first = driver(variant, folder)
    tried = [first.next(name, True) for name in ("a", "b")]
    first.on_trial_complete("a", ends(0.5))
    first.on_trial_complete("b", {"failure": "out of memory"})
    second = driver(variant, folder)
    tried += [second.next(name, True) for name in ("c", "d")]
    assert second.next("e", True) is None, "two of the four were tried before"
    assert [one.settings for one in second.tried] == tried
    assert [(one.ended, one.failure, one.values) for one in second.tried] == [
        ("done", None, {"loss": 0.5}),
        ("failed", "out of memory", {}),
        (None, None, {}),
        (None, None, {}),
    ]


def test_a_trial_that_a_killed_driver_left_goes_on_with_the_settings_it_had(
    variant: Variant, folder: StoragePath
) -> None:
    killed = driver(variant, folder)
    left = killed.next("a", True)
    killed.should_stop("a", 1, 0.9)
    second = driver(variant, folder)
    assert second.next("x", False) == left, "even when the time for fresh trials is over"
    assert second.next("y", False) is None
    second.on_trial_complete("x", ends(0.4))
    (only,) = second.tried
    assert (only.ended, only.values, only.losses) == ("done", {"loss": 0.4}, {1: 0.9})


def test_a_new_driver_does_not_draw_the_first_drivers_points_again(variant: Variant, folder: StoragePath) -> None:
    drivers = [driver(variant, folder, trials=6) for _ in range(1)]
    points = []
    for number in range(6):
        points.append(drivers[-1].next(str(number), True))
        drivers[-1].on_trial_complete(str(number), ends(1.0))
        drivers.append(driver(variant, folder, trials=6))
    rates = {point["finetune.lr"] for point in points if point}
    assert len(rates) == 6


def test_halving_stops_the_worse_and_remembers_the_losses_of_earlier_drivers(
    variant: Variant, folder: StoragePath
) -> None:
    asha = {"grace": 0.2, "reduction": 2}
    first = driver(variant, folder, asha=asha)
    first.next("good", True)
    assert not first.should_stop("good", 1, 0.9), "before the grace is over nobody is stopped"
    assert not first.should_stop("good", 2, 0.5)
    first.on_trial_complete("good", ends(0.4))
    second = driver(variant, folder, asha=asha)
    second.next("bad", True)
    assert second.should_stop("bad", 2, 0.8)
    second.on_trial_complete("bad", {"mark": 2, "loss": 0.8})
    assert [one.ended for one in second.tried] == ["done", "stopped"]
    states = [trial.state for trial in second._ot_study.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED], "TPE must not take a stopped trial's loss for its end"


def test_where_a_score_is_to_grow_losses_still_count_as_better_when_they_are_less(
    variant: Variant, folder: StoragePath
) -> None:
    wanted = {"objective": {"seconds": "max"}, "asha": {"grace": 0.2, "reduction": 2}}
    study = driver(variant, folder, **wanted)
    study.next("good", True)
    assert not study.should_stop("good", 2, 0.5)
    study.next("bad", True)
    assert study.should_stop("bad", 2, 0.8)
    assert study.tried[1].losses == {2: 0.8}


def test_several_objectives_are_weighed_together(variant: Variant, folder: StoragePath) -> None:
    study = driver(variant, folder, objective={"loss": "min", "seconds": "min"})
    study.next("a", True)
    assert not study.should_stop("a", 5, 0.5)
    study.on_trial_complete("a", {"objective/loss": 0.5, "objective/seconds": 60.0})
    assert study.tried[0].values == {"loss": 0.5, "seconds": 60.0}


def test_another_search_under_the_same_name_is_refused_and_not_mixed_in(variant: Variant, folder: StoragePath) -> None:
    url = f"sqlite:///{folder.path}/studies.db"
    driver(variant, folder, study_storage=url).next("a", True)
    driver(variant, folder, study_storage=url, trials=9)  # going on for longer is the same search
    with pytest.raises(UserError, match=r"the study 'rates' is there and was of another search .* give another name"):
        driver(variant, folder, study_storage=url, space={"finetune.lr": {"loguniform": [1e-5, 1e-3]}})
    other = variants(sweep(set={"finetune.global_batch_size": 64}), [])[0]
    with pytest.raises(UserError, match="another search"):
        studies(folder, study_storage=url).look(other)
    with pytest.raises(UserError, match="another search"):
        studies(folder / "elsewhere", study_storage=url).look(variant)


def test_variants_of_one_sweep_have_a_study_each(folder: StoragePath) -> None:
    axes = {"connector": {"pretrained": {"pretrain.enabled": True}, "random": {"pretrain.enabled": False}}}
    two = variants(sweep(axes=axes, seeds=(0,)), [])
    searches = studies(folder).take(two)
    searches[0].next("a", True)
    assert [len(one.tried) for one in searches] == [1, 0]
    names = {one._ot_study.study_name for one in searches}
    assert names == {"rates/connector=pretrained/seed=0", "rates/connector=random/seed=0"}


def test_a_database_that_is_not_there_is_told_without_its_url(variant: Variant, folder: StoragePath) -> None:
    with pytest.raises(UserError, match=r"search\.study_storage: cannot use the database") as error:
        driver(variant, folder, study_storage="sqlite:////no/such/folder/secret.db")
    assert "secret" not in str(error.value)


def test_a_database_url_that_names_what_the_environment_lacks_is_told(variant: Variant, folder: StoragePath) -> None:
    with pytest.raises(UserError, match="the environment has no NO_SUCH; set it"):
        driver(variant, folder, study_storage="postgresql://$NO_SUCH@host/db")


def test_a_database_url_takes_its_secrets_from_the_environment(
    variant: Variant, folder: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIES", f"{folder.path}/studies.db")
    driver(variant, folder, study_storage="sqlite:///$STUDIES").next("a", True)
    assert (folder / "studies.db").exists()


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=3), max_size=6), st.data())
def test_a_journal_reads_as_it_was_written_whoever_gathered_it_and_wherever_that_was_cut_off(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[int]], data: st.DataObject
) -> None:
    folder = storage_path(tmp_path_factory.mktemp("journal")) / "study"
    for batch in batches:
        StorageJournal(folder).append_logs([{"value": value} for value in batch])
        before = folder.children()
        kept = {file.name: file.read_bytes() for file in before}
        StorageJournal(folder).gather()
        for file in before[data.draw(st.integers(1, len(before))) :]:
            file.write_bytes(kept[file.name])  # as if killed before it was removed
    written = [{"value": value} for batch in batches for value in batch]
    assert list(StorageJournal(folder).read_logs(0)) == written


def test_a_journal_survives_a_writer_that_was_killed(variant: Variant, folder: StoragePath) -> None:
    left = driver(variant, folder).next("a", True)
    (folder / "study" / ".00000003.jsonl.ab12cd34.part").write_bytes(b'{"half')
    studies(folder).take([variant])
    assert not [file for file in (folder / "study").children() if file.name.startswith(".")]
    assert driver(variant, folder).next("b", False) == left


def test_a_trial_that_was_not_given_all_its_settings_is_forgotten(variant: Variant, folder: StoragePath) -> None:
    first = driver(variant, folder)
    first._ot_study.ask(fixed_distributions={"finetune.lr": FloatDistribution(1e-6, 1e-4, log=True)})
    again = driver(variant, folder)
    assert again.tried == []
    assert all(again.next(name, True) for name in "abcd"), "it matches_filters nothing of the budget"
    assert studies(folder).look(variant) == again.tried


def test_a_study_of_other_data_is_another_study(variant: Variant, folder: StoragePath) -> None:
    driver(variant, folder).next("a", True)
    edited = Studies(search(), "rates", folder, lambda one: "questions were edited")
    with pytest.raises(UserError, match="recipe, data or --storage differ"):
        edited.take([variant])


def test_a_journal_lies_in_a_bucket_as_well(s3: str, variant: Variant) -> None:
    bucket = storage_path(f"{s3}/studies")
    driver(variant, bucket).next("a", True)
    assert driver(variant, bucket).next("b", False) is not None


def test_drawn_points_are_within_the_space() -> None:
    for point in drawn(search(), 20):
        assert 1e-6 <= point["finetune.lr"] <= 1e-4
        assert point["finetune.epochs"] in (1, 2, 3)


@given(st.integers(1, 200))
def test_marks_cut_a_training_of_any_length_and_end_with_its_last_step(steps: int) -> None:
    marks = Rungs()
    reached = [found for step in range(1, steps + 1) if (found := marks.saw(step, steps, float(step)))]
    assert [mark for mark, _ in reached] == sorted({mark for mark, _ in reached})
    assert reached[-1][0] == RUNGS
    assert len(reached) == min(steps, RUNGS)
    if steps >= RUNGS:
        assert reached[0][1] == pytest.approx((1 + -(-steps // RUNGS)) / 2)


def handed_out(sources: list[Source], over: bool = False) -> tuple[SweepSearcher, list[str], list[tuple[int, str]]]:
    """A searcher as Tune uses it, the names of the trials it began, and the numbers of those it stopped."""
    begun: list[str] = []
    stopped: list[tuple[int, str]] = []

    def begin(variant: Variant) -> int:
        begun.append(variant.name)
        return len(begun) - 1

    def made(variant: Variant, settings: Mapping[str, Any]) -> Variant:
        return with_settings(sweep(), variant, settings, [])

    return SweepSearcher(sources, made, begin, lambda *told: stopped.append(told), lambda: over), begun, stopped


def test_variants_without_a_search_are_handed_out_once_in_their_order() -> None:
    found = variants(sweep(seeds=(3, 1, 2)), [])
    trials, begun, _ = handed_out([SingleTrial(one) for one in found])
    assert [trials.suggest(name) for name in "abcd"] == [{"trial": 0}, {"trial": 1}, {"trial": 2}, "FINISHED"]
    assert begun == ["seed=3", "seed=1", "seed=2"]


def test_searches_take_turns_and_settings_that_are_no_recipe_fail_by_themselves(
    variant: Variant, folder: StoragePath
) -> None:
    too_small = driver(variant, folder / "one", space={"finetune.max_tokens_per_pack": {"choice": [16]}}, trials=2)
    good = driver(variant, folder / "two", trials=2)
    trials, begun, _ = handed_out([too_small, good])
    assert [trials.suggest(name) for name in "abc"] == [{"trial": 0}, {"trial": 1}, "FINISHED"]
    assert len(begun) == 2
    assert all("max_tokens_per_pack=16 is less than" in (one.failure or "") for one in too_small.tried)


def test_a_trial_that_is_stopped_is_told_to_the_board(variant: Variant, folder: StoragePath) -> None:
    study = driver(variant, folder, asha={"grace": 0.1, "reduction": 2})
    trials, _, stopped = handed_out([study])
    trials.suggest("good")
    trials.suggest("bad")
    assert not trials.should_stop("good", {"mark": 1, "loss": 0.1})
    assert trials.should_stop("bad", {"mark": 1, "loss": 0.9})
    assert stopped == [(1, "stopped")]
    assert not trials.should_stop("good", ends(0.1))


def test_a_plan_looks_at_a_study_without_changing_it(variant: Variant, folder: StoragePath) -> None:
    assert studies(folder).look(variant) == []
    assert not list(folder.walk_files())
    driver(variant, folder).next("a", True)
    before = json.dumps(list(folder.walk_files()))
    (only,) = studies(folder).look(variant)
    assert only.ended is None
    assert json.dumps(list(folder.walk_files())) == before
