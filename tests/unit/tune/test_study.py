"""A study stores the trials of a search for every later driver, including those that were stopped early or failed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState

from raylava.errors import UserError
from raylava.storage import StoragePath, storage_path
from raylava.tune.study import StorageJournal, StudyRegistry, sample_settings
from raylava.tune.variants import Variant, variants
from tests.support.studies import loss_result, make_search, make_sweep, open_registry, resume_study


def test_second_driver_loads_earlier_trials_and_starts_only_the_remaining_ones(
    variant: Variant, folder: StoragePath
) -> None:
    first = resume_study(variant, folder)
    suggested = [first.next_settings(name, True) for name in ("a", "b")]
    first.on_trial_complete("a", loss_result(0.5))
    first.on_trial_complete("b", {"failure": "out of memory"})
    second = resume_study(variant, folder)
    suggested += [second.next_settings(name, True) for name in ("c", "d")]
    assert second.next_settings("e", True) is None, "the first driver started two of the four trials"
    assert [trial.settings for trial in second.trials] == suggested
    assert [(trial.outcome, trial.failure, trial.objectives) for trial in second.trials] == [
        ("done", None, {"loss": 0.5}),
        ("failed", "out of memory", {}),
        (None, None, {}),
        (None, None, {}),
    ]


def test_trial_interrupted_with_its_driver_resumes_with_the_same_settings(
    variant: Variant, folder: StoragePath
) -> None:
    killed = resume_study(variant, folder)
    interrupted = killed.next_settings("a", True)
    killed.record_loss("a", 1, 0.9)
    second = resume_study(variant, folder)
    assert second.next_settings("x", False) == interrupted, "even when the search budget is exhausted"
    assert second.next_settings("y", False) is None
    second.on_trial_complete("x", loss_result(0.4))
    (trial,) = second.trials
    assert (trial.outcome, trial.objectives, trial.losses) == ("done", {"loss": 0.4}, {1: 0.9})


def test_restored_source_continues_its_running_trial_instead_of_starting_it_again(
    variant: Variant, folder: StoragePath
) -> None:
    saved = resume_study(variant, folder)
    running = saved.next_settings("a", True)
    restored = resume_study(variant, folder)
    restored.restore(json.loads(json.dumps(saved.state())))
    assert restored.next_settings("b", True) != running
    restored.on_trial_complete("a", loss_result(0.3))
    assert [trial.outcome for trial in restored.trials] == ["done", None]
    assert restored.trials[0].settings == running


def test_new_driver_does_not_repeat_points_of_earlier_drivers(variant: Variant, folder: StoragePath) -> None:
    drivers = [resume_study(variant, folder, trials=6)]
    points = []
    for number in range(6):
        points.append(drivers[-1].next_settings(str(number), True))
        drivers[-1].on_trial_complete(str(number), loss_result(1.0))
        drivers.append(resume_study(variant, folder, trials=6))
    rates = {point["finetune.lr"] for point in points if point}
    assert len(rates) == 6


def test_trial_that_was_stopped_is_no_result_and_later_drivers_know_its_losses(
    variant: Variant, folder: StoragePath
) -> None:
    first = resume_study(variant, folder)
    first.next_settings("stopped", True)
    first.record_loss("stopped", 1, 0.9)
    first.record_loss("stopped", 2, 0.8)
    first.on_trial_complete("stopped", {"rung": 2, "loss": 0.8})
    second = resume_study(variant, folder)
    second.next_settings("running", True)
    second.record_loss("running", 1, 0.7)
    assert [trial.outcome for trial in second.trials] == ["stopped", None]
    assert second.finished_losses() == [{1: 0.9, 2: 0.8}]
    states = [trial.state for trial in second.study.trials]
    assert states == [TrialState.PRUNED, TrialState.RUNNING], "TPE must not treat a stopped trial's loss as final"


def test_losses_are_recorded_so_that_lower_is_better_even_when_the_objective_is_maximized(
    variant: Variant, folder: StoragePath
) -> None:
    study = resume_study(variant, folder, objective={"seconds": "max"})
    study.next_settings("a", True)
    study.record_loss("a", 2, 0.8)
    assert study.trials[0].losses == {2: 0.8}
    assert study.study.trials[0].intermediate_values == {2: -0.8}


def test_multiple_objectives_are_recorded_together(variant: Variant, folder: StoragePath) -> None:
    study = resume_study(variant, folder, objective={"loss": "min", "seconds": "min"})
    study.next_settings("a", True)
    study.record_loss("a", 5, 0.5)
    study.on_trial_complete("a", {"objective/loss": 0.5, "objective/seconds": 60.0})
    assert study.trials[0].objectives == {"loss": 0.5, "seconds": 60.0}


def test_study_of_another_search_under_the_same_name_is_refused(variant: Variant, folder: StoragePath) -> None:
    url = f"sqlite:///{folder.path}/studies.db"
    resume_study(variant, folder, study_storage=url).next_settings("a", True)
    resume_study(variant, folder, study_storage=url, trials=9, max_cost=7)  # a larger budget extends the same search
    with pytest.raises(
        UserError,
        match=r"the study 'rates' already exists and belongs to another search .* set search.study to another name",
    ):
        resume_study(variant, folder, study_storage=url, space={"finetune.lr": {"loguniform": [1e-5, 1e-3]}})
    other = variants(make_sweep(set={"finetune.global_batch_size": 64}), [])[0]
    with pytest.raises(UserError, match="another search"):
        open_registry(folder, study_storage=url).load_trials(other)
    with pytest.raises(UserError, match="another search"):
        open_registry(folder / "elsewhere", study_storage=url).load_trials(variant)


def test_each_variant_of_a_sweep_has_its_own_study(folder: StoragePath) -> None:
    axes = {"connector": {"pretrained": {"pretrain.enabled": True}, "random": {"pretrain.enabled": False}}}
    sweep_variants = variants(make_sweep(axes=axes, seeds=(0,)), [])
    studies = open_registry(folder).resume_studies(sweep_variants)
    studies[0].next_settings("a", True)
    assert [len(study.trials) for study in studies] == [1, 0]
    names = {study.study.study_name for study in studies}
    assert names == {"rates/connector=pretrained/seed=0", "rates/connector=random/seed=0"}


def test_error_for_a_missing_database_does_not_reveal_its_url(variant: Variant, folder: StoragePath) -> None:
    with pytest.raises(UserError, match=r"search\.study_storage: cannot open the database") as error:
        resume_study(variant, folder, study_storage="sqlite:////no/such/folder/secret.db")
    assert "secret" not in str(error.value)


def test_database_url_with_an_unset_environment_variable_is_refused(variant: Variant, folder: StoragePath) -> None:
    with pytest.raises(UserError, match="environment variable NO_SUCH is not set; set it"):
        resume_study(variant, folder, study_storage="postgresql://$NO_SUCH@host/db")


def test_value_of_an_environment_variable_is_inserted_as_it_is(
    variant: Variant, folder: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIES", f"{folder.path}/$HOME-${{NO_SUCH}}.db")
    resume_study(variant, folder, study_storage="sqlite:///${STUDIES}").next_settings("a", True)
    assert (folder / "$HOME-${NO_SUCH}.db").exists()


def test_database_url_expands_environment_variables(
    variant: Variant, folder: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDIES", f"{folder.path}/studies.db")
    resume_study(variant, folder, study_storage="sqlite:///$STUDIES").next_settings("a", True)
    assert (folder / "studies.db").exists()


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=3), max_size=6), st.data())
def test_journal_is_unchanged_by_compaction_even_when_it_is_interrupted(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[int]], data: st.DataObject
) -> None:
    folder = storage_path(tmp_path_factory.mktemp("journal")) / "study"
    for batch in batches:
        StorageJournal(folder).append_logs([{"value": value} for value in batch])
        files = folder.children()
        contents = {file.name: file.read_bytes() for file in files}
        StorageJournal(folder).compact()
        for file in files[data.draw(st.integers(1, len(files))) :]:
            file.write_bytes(contents[file.name])  # as if killed before it was deleted
    logs = [{"value": value} for batch in batches for value in batch]
    assert list(StorageJournal(folder).read_logs(0)) == logs


def test_journal_survives_a_killed_writer(variant: Variant, folder: StoragePath) -> None:
    interrupted = resume_study(variant, folder).next_settings("a", True)
    (folder / "study" / ".00000003.jsonl.ab12cd34.part").write_bytes(b'{"half')
    open_registry(folder).resume_studies([variant])
    assert not [file for file in (folder / "study").children() if file.name.startswith(".")]
    assert resume_study(variant, folder).next_settings("b", False) == interrupted


def test_trial_with_incomplete_settings_is_ignored(variant: Variant, folder: StoragePath) -> None:
    first = resume_study(variant, folder)
    first.study.ask(fixed_distributions={"finetune.lr": FloatDistribution(1e-6, 1e-4, log=True)})
    second = resume_study(variant, folder)
    assert second.trials == []
    assert all(second.next_settings(name, True) for name in "abcd"), "it does not count towards the budget"
    assert open_registry(folder).load_trials(variant) == second.trials


def test_study_of_other_data_is_refused(variant: Variant, folder: StoragePath) -> None:
    resume_study(variant, folder).next_settings("a", True)
    edited = StudyRegistry(make_search(), "rates", folder, lambda variant: "questions were edited")
    with pytest.raises(UserError, match="recipe, data or --storage differ"):
        edited.resume_studies([variant])


def test_sampled_settings_are_within_the_search_space() -> None:
    for settings in sample_settings(make_search(), 20):
        assert 1e-6 <= settings["finetune.lr"] <= 1e-4
        assert settings["finetune.epochs"] in (1, 2, 3)


def test_loading_trials_does_not_modify_the_study(variant: Variant, folder: StoragePath) -> None:
    assert open_registry(folder).load_trials(variant) == []
    assert not list(folder.walk_files())
    resume_study(variant, folder).next_settings("a", True)
    before = json.dumps(list(folder.walk_files()))
    (trial,) = open_registry(folder).load_trials(variant)
    assert trial.outcome is None
    assert json.dumps(list(folder.walk_files())) == before


@pytest.mark.parametrize(("sampler", "expected"), [("tpe", TPESampler), ("random", RandomSampler)])
def test_search_uses_the_sampler_that_it_names(
    sampler: str, expected: type, variant: Variant, folder: StoragePath
) -> None:
    assert type(resume_study(variant, folder, sampler=sampler).study.sampler) is expected
