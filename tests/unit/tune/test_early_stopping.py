"""Trials are stopped early by Ray Tune's schedulers, within their variant, also against trials of earlier drivers."""

from typing import Any

import numpy as np
import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from raylava.storage import StoragePath
from raylava.tune.early_stopping import EarlyStopping
from raylava.tune.searcher import TrialSource
from raylava.tune.study import RUNGS
from raylava.tune.sweep import EarlyStoppingConfig
from raylava.tune.variants import Variant, variants
from tests.support.studies import loss_result, make_sweep, open_registry, resume_study
from tests.unit.tune.test_searcher import make_searcher


class Search:
    """Trials of sources, started by a searcher and judged by EarlyStopping as in a run of Ray Tune."""

    def __init__(self, sources: list[TrialSource], axes: dict[str, Any] | None = None, **settings: Any) -> None:
        self.searcher, _, self.finished = make_searcher(sources, axes=axes or {})
        self.scheduler = EarlyStopping(self.searcher, EarlyStoppingConfig.model_validate(settings))
        self.trials: dict[str, Trial] = {}

    def start(self, name: str) -> None:
        self.trials[name] = Trial("raylava", stub=True, trial_id=name)
        self.searcher.suggest(name)

    def continues(self, name: str, rung: int, loss: float) -> bool:
        result = {"rung": rung, "loss": loss}
        decision = self.scheduler.on_trial_result(_Controller(list(self.trials.values())), self.trials[name], result)
        return decision == TrialScheduler.CONTINUE


class _Controller:
    """Ray Tune's controller, of which schedulers read the live trials; all of them are pending."""

    def __init__(self, trials: list[Trial]) -> None:
        self._trials = trials

    def get_live_trials(self) -> list[Trial]:
        return self._trials


def test_asha_stops_the_worse_trial_after_the_grace_period_and_tells_the_tracker(
    variant: Variant, folder: StoragePath
) -> None:
    search = Search([resume_study(variant, folder)], algorithm="asha", grace=0.2, reduction=2)
    search.start("good")
    search.start("bad")
    assert search.continues("good", 1, 0.9), "no trial is stopped during the grace period"
    assert search.continues("bad", 1, 2.0)
    assert search.continues("good", 2, 0.5)
    assert not search.continues("bad", 2, 0.8)
    assert search.finished == [(1, "stopped")]


@pytest.mark.parametrize("algorithm", ["asha", "hyperband", "median"])
def test_trials_of_earlier_drivers_are_compared(algorithm: str, variant: Variant, folder: StoragePath) -> None:
    np.random.seed(0)  # Ray Tune draws the bracket of a trial from the global generator
    first = resume_study(variant, folder, trials=9)
    for number in range(6):
        first.next_settings(str(number), True)
        for rung in range(1, RUNGS + 1):
            first.record_loss(str(number), rung, 0.1 + 0.01 * number)
        first.on_trial_complete(str(number), loss_result(0.1))
    search = Search([resume_study(variant, folder, trials=9)], algorithm=algorithm)
    search.start("bad")
    assert any(not search.continues("bad", rung, 5.0) for rung in range(1, RUNGS))


def test_a_good_trial_is_never_stopped_and_a_complete_one_is_evaluated(variant: Variant, folder: StoragePath) -> None:
    first = resume_study(variant, folder, trials=9)
    first.next_settings("0", True)
    for rung in range(1, RUNGS + 1):
        first.record_loss("0", rung, 1.0)
    first.on_trial_complete("0", loss_result(1.0))
    search = Search([resume_study(variant, folder, trials=9)], algorithm="asha", grace=1.0, reduction=2)
    search.start("good")
    assert all(search.continues("good", rung, 0.5) for rung in range(1, RUNGS + 1))
    search.start("bad")
    assert all(search.continues("bad", rung, 9.0) for rung in range(1, RUNGS + 1)), "nothing is left to save"


def test_median_rule_compares_once_there_are_enough_trials_and_never_pauses(
    variant: Variant, folder: StoragePath
) -> None:
    search = Search([resume_study(variant, folder, trials=9)], algorithm="median", min_samples=2)
    for number, loss in enumerate((0.5, 0.6)):
        search.start(str(number))
        assert all(search.continues(str(number), rung, loss) for rung in range(1, RUNGS + 1))
    search.start("bad")
    assert not search.continues("bad", 1, 0.9)
    search.start("good")
    assert search.continues("good", 1, 0.1)


def test_losses_of_different_variants_are_not_compared(folder: StoragePath) -> None:
    axes = {"connector": {"pretrained": {"pretrain.enabled": True}, "random": {"pretrain.enabled": False}}}
    studies = open_registry(folder).resume_studies(variants(make_sweep(axes=axes), []))
    search = Search(list(studies), axes, algorithm="asha", grace=0.1, reduction=2)
    search.start("of the first variant")
    search.start("of the second variant")
    assert search.continues("of the first variant", 1, 0.1)
    assert search.continues("of the second variant", 1, 9.0)
