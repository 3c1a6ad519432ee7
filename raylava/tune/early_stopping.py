"""Stops unpromising trials of a search early, by the schedulers of Ray Tune."""

from collections.abc import Iterable, Mapping
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from raylava.tune.searcher import SweepSearcher, TuneResult
from raylava.tune.study import RUNGS
from raylava.tune.sweep import EarlyStoppingConfig

_TIME, _LOSS = "rung", "loss"  # keys of the results that trials report during finetuning


class EarlyStopping(FIFOScheduler):
    """Asks a scheduler of Ray Tune, one for each variant, whether a trial that reached a rung should stop.

    Ray Tune's schedulers alone would not do: they compare all trials of an experiment, but the losses of variants with
    different models or corpora are not comparable; they know nothing of the trials that an earlier driver ran, whose
    losses are replayed here from the study; and they may pause a trial, which would repeat its steps since the last
    checkpoint, and is therefore ignored. A trial that has reached the last rung is always finished.
    """

    def __init__(self, searcher: SweepSearcher, config: EarlyStoppingConfig | None) -> None:
        super().__init__()
        self._searcher, self._config = searcher, config
        self._schedulers: dict[str, TrialScheduler] = {}
        self._known: set[str] = set()  # trials that have reported

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: TuneResult) -> str:
        """See TrialScheduler."""
        if _TIME not in result:
            return str(TrialScheduler.CONTINUE)
        self._searcher.record_loss(trial.trial_id, result[_TIME], result[_LOSS])
        if self._config is None or not self._should_stop(tune_controller, trial, result):
            return str(TrialScheduler.CONTINUE)
        self._searcher.record_stop(trial.trial_id)
        return str(TrialScheduler.STOP)

    def _should_stop(self, tune_controller: Any, trial: Trial, result: TuneResult) -> bool:
        assert self._config is not None
        source = self._searcher.source(trial.trial_id)
        if source.variant.name not in self._schedulers:
            self._schedulers[source.variant.name] = _create_scheduler(self._config, source.finished_losses())
        scheduler = self._schedulers[source.variant.name]
        if trial.trial_id not in self._known:
            self._known.add(trial.trial_id)
            scheduler.on_trial_add(tune_controller, trial)
        decision = scheduler.on_trial_result(tune_controller, trial, dict(result))
        return decision == TrialScheduler.STOP and result[_TIME] < RUNGS

    def __getstate__(self) -> dict[str, Any]:
        """Return the searcher alone: a later driver replays the losses."""
        return {"_searcher": self._searcher}


def _create_scheduler(config: EarlyStoppingConfig, finished: Iterable[Mapping[int, float]]) -> TrialScheduler:
    """Return a scheduler that knows the losses, by rung, of trials that have ended."""
    grace = round(RUNGS * config.grace)
    if config.algorithm == "median":
        scheduler: TrialScheduler = MedianStoppingRule(
            time_attr=_TIME, metric=_LOSS, mode="min", grace_period=grace, min_samples_required=config.min_samples
        )
    else:
        scheduler = AsyncHyperBandScheduler(
            time_attr=_TIME,
            metric=_LOSS,
            mode="min",
            max_t=RUNGS + 1,  # a trial that reaches max_t is stopped, here before its evaluation
            grace_period=grace,
            reduction_factor=config.reduction,
            brackets=config.brackets if config.algorithm == "hyperband" else 1,
        )
    for losses in finished:
        trial = Trial("raylava", stub=True)
        scheduler.on_trial_add(None, trial)
        for rung in sorted(losses):
            result = {_TIME: rung, _LOSS: losses[rung]}
            if scheduler.on_trial_result(_NoController(), trial, result) == TrialScheduler.STOP:
                break  # the scheduler expects no further result
    return scheduler


class _NoController:
    """Stands for Ray Tune's controller while losses are replayed: no trial is waiting."""

    def get_live_trials(self) -> list[Trial]:
        """Return no trial."""
        return []
