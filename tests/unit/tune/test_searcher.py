"""The searcher suggests trials of all sources in turn and reports those that are stopped early."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import cloudpickle

from raylava.storage import StoragePath, storage_path
from raylava.tune.budget import SearchBudget
from raylava.tune.early_stopping import EarlyStopping
from raylava.tune.searcher import SingleTrial, SweepSearcher, TrialSource
from raylava.tune.study import VariantStudy
from raylava.tune.variants import Variant, variants, with_settings
from tests.support.studies import loss_result, make_sweep, resume_study


def make_searcher(
    sources: list[TrialSource], limit: list[int] | None = None, **sweep: Any
) -> tuple[SweepSearcher, list[str], list[tuple[int, str]]]:
    """Return a searcher, the names of the trials that it adds, and the (number, outcome) of those that it finishes."""
    added: list[str] = []
    finished: list[tuple[int, str]] = []

    def add_trial(variant: Variant) -> int:
        added.append(variant.name)
        return len(added) - 1

    def apply_settings(variant: Variant, settings: Mapping[str, Any]) -> Variant:
        return with_settings(make_sweep(**sweep), variant, settings, [])

    searcher = SweepSearcher(
        sources,
        apply_settings,
        add_trial,
        lambda *outcome: finished.append(outcome),
        SearchBudget(storage_path("unused"), None),
        lambda: limit[0] if limit else 100,
    )
    return searcher, added, finished


def test_trials_wait_while_as_many_run_as_the_cluster_can_hold() -> None:
    limit = [1]
    sources: list[TrialSource] = [SingleTrial(variant) for variant in variants(make_sweep(seeds=(0, 1, 2, 3)), [])]
    searcher, _, _ = make_searcher(sources, limit)
    assert searcher.suggest("a") == {"trial": 0}
    assert searcher.suggest("b") is None, "Ray Tune asks again"
    limit[0] = 3  # nodes have joined
    assert [searcher.suggest(name) for name in "bcd"] == [{"trial": 1}, {"trial": 2}, None]
    limit[0] = 1  # nodes have left: running trials continue
    searcher.on_trial_complete("a", {"objective/x": 1.0})
    assert searcher.suggest("d") is None
    searcher.on_trial_complete("b", {"objective/x": 1.0})
    searcher.on_trial_complete("c", {"objective/x": 1.0})
    assert searcher.suggest("d") == {"trial": 3}


def test_variants_without_a_search_are_suggested_once_in_order() -> None:
    searcher, added, _ = make_searcher([SingleTrial(variant) for variant in variants(make_sweep(seeds=(3, 1, 2)), [])])
    assert [searcher.suggest(name) for name in "abcd"] == [{"trial": 0}, {"trial": 1}, {"trial": 2}, "FINISHED"]
    assert added == ["seed=3", "seed=1", "seed=2"]


def test_studies_alternate_and_settings_that_form_no_valid_recipe_fail_alone(
    variant: Variant, folder: StoragePath
) -> None:
    too_small = resume_study(
        variant, folder / "one", space={"finetune.max_tokens_per_pack": {"choice": [16]}}, trials=2
    )
    valid = resume_study(variant, folder / "two", trials=2)
    searcher, added, _ = make_searcher([too_small, valid])
    assert [searcher.suggest(name) for name in "abc"] == [{"trial": 0}, {"trial": 1}, "FINISHED"]
    assert len(added) == 2
    assert all("max_tokens_per_pack=16 is less than" in (trial.failure or "") for trial in too_small.trials)


def test_restored_searcher_neither_repeats_nor_forgets_trials(
    variant: Variant, folder: StoragePath, tmp_path: Path
) -> None:
    url = f"sqlite:///{folder.path}/studies.db"
    single = variants(make_sweep(axes={"size": {"small": {"finetune.max_steps": 1}}}, seeds=(5,)), [])[0]

    def sources() -> list[TrialSource]:
        return [SingleTrial(single), resume_study(variant, folder, study_storage=url, trials=2)]

    saved, _, _ = make_searcher(sources())
    for trial_id in "ab":
        saved.suggest(trial_id)
    saved.save(str(tmp_path / "searcher.json"))
    restored_sources = sources()
    restored, added, _ = make_searcher(restored_sources)
    restored.restore(str(tmp_path / "searcher.json"))
    assert [restored.suggest(trial_id) for trial_id in "cd"] == [{"trial": 0}, "FINISHED"]
    assert len(added) == 1, "the second trial of the study is the only one that had not been started"
    restored.on_trial_complete("b", loss_result(0.2))
    (study,) = (source for source in restored_sources if isinstance(source, VariantStudy))
    assert [trial.outcome for trial in study.trials] == ["done", None]


def test_pickled_copy_holds_the_state_and_no_connection(variant: Variant, folder: StoragePath) -> None:
    url = f"sqlite:///{folder.path}/secret-studies.db"
    searcher, _, _ = make_searcher([resume_study(variant, folder, study_storage=url)])
    searcher.suggest("a")
    pickled = cloudpickle.dumps(EarlyStopping(searcher, None))
    assert b"secret-studies" not in pickled
    assert cloudpickle.loads(pickled)._searcher.__dict__ == searcher.state()
