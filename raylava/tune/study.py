"""One variant's search: an Optuna study that outlives the driver, asked and told by way of Ray Tune's OptunaSearch.

The study is the search's memory. It lies in a database, or as Optuna's own journal in the sweep's folder, wherever that
is. A trial that a killed driver left running is handed out again with the settings it had, so that its artifacts and
checkpoints are found; one that is stopped early is told as pruned, with the losses it reached.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.study import Study, StudySummary
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search.optuna import OptunaSearch

from raylava.artifacts import fingerprint
from raylava.errors import UserError
from raylava.storage import StoragePath, retry
from raylava.tune.records import LOST, TrialRecord
from raylava.tune.sweep import Range, Search
from raylava.tune.variants import Variant

RUNGS = 10  # how often in a training its loss is compared
_FAILURE = "failure"
_OWNER = "raylava"
_JOURNAL = "study"
_RETRY_SECONDS = 600.0  # that storage may fail before the sweep does


def distribution(found: Range) -> BaseDistribution:
    """Optuna's form of a range."""
    if found.loguniform:
        return FloatDistribution(*found.loguniform, log=True)
    if found.uniform:
        return FloatDistribution(*found.uniform)
    if found.integer:
        return IntDistribution(*found.integer)
    assert found.choice is not None
    return CategoricalDistribution(found.choice)


def drawn(search: Search, count: int) -> list[dict[str, Any]]:
    """So many points of the space, without memory: what a search would come to, before it is begun."""
    study = optuna.create_study(sampler=RandomSampler(seed=search.seed))
    space = {key: distribution(one) for key, one in search.space.items()}
    return [study.ask(fixed_distributions=space).params for _ in range(count)]


class Studies:
    """The studies of a search, one a variant, in a database or in the sweep's folder."""

    def __init__(self, search: Search, name: str, folder: StoragePath, about: Callable[[Variant], Any]) -> None:
        """`name` is theirs, `folder` the sweep's; `about` is what a variant's results depend on (JSON-able)."""
        self._search, self._name, self._folder, self._about = search, name, folder, about

    def look(self, variant: Variant) -> list[TrialRecord]:
        """The trials of a variant; only looks, a driver may be going on with them.

        Raises UserError for a database that cannot be used, and for a study that is another search's.
        """
        storage, name = self._looked_at, self._study(variant)
        if name not in _studies(storage):
            return []
        self._check_owner(storage, name, variant)
        study = optuna.load_study(study_name=name, storage=storage)
        return _all_tried(study, self._search)

    @cached_property
    def _looked_at(self) -> BaseStorage:
        return self._open(StorageJournal(self._folder / _JOURNAL))

    def take(self, variants: Sequence[Variant]) -> "list[VariantSearch]":
        """Go on with them, as the one driver that does. Raises as `look`."""
        journal = StorageJournal(self._folder / _JOURNAL)
        journal.gather()
        storage = self._open(journal)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        found = []
        for variant in variants:
            name = self._study(variant)
            self._check_owner(storage, name, variant)
            found.append(VariantSearch(variant, self._search, storage, name, self._identity(variant)))
        return found

    def _open(self, journal: "StorageJournal") -> BaseStorage:
        if self._search.study_storage is None:
            return JournalStorage(journal)
        url = os.path.expandvars(self._search.study_storage)
        unset = re.search(r"\$\{?(\w+)", url)
        if unset:
            raise UserError(
                f"search.study_storage: the environment has no {unset[1]}; set it, or write the URL in full"
            )
        try:
            return RDBStorage(url)
        except Exception as error:  # whatever its driver raises may hold the URL's password: it is not told or kept
            told = f"cannot use the database ({type(error).__name__}); look at its URL and your rights"
            raise UserError(f"search.study_storage: {told}") from None

    def _study(self, variant: Variant) -> str:
        return "/".join([self._name, *variant.name.split()])

    def _identity(self, variant: Variant) -> str:
        """What a study is about and where its artifacts are; not how long it goes on."""
        about = self._search.model_dump(mode="json", exclude={"trials", "hours", "study", "study_storage"})
        return fingerprint("study", {"search": about, "about": self._about(variant), "sweep": self._folder.uri})

    def _check_owner(self, storage: BaseStorage, name: str, variant: Variant) -> None:
        """Two searches in one study would learn from each other's trials as if they were their own."""
        study = _studies(storage).get(name)
        if study is not None and study.n_trials and study.user_attrs.get(_OWNER) != self._identity(variant):
            raise UserError(
                f"search.study: the study {name!r} is there and was of another search (space, objective, sampler, "
                "recipe, data or --storage differ); give another name to the study"
            )


class StorageJournal(BaseJournalBackend):
    """Optuna's journal in a folder of any filesystem: an object for each batch of lines, named by its first line's
    number, so that nothing is rewritten. For one driver at a time (the sweep's lock).
    """

    def __init__(self, folder: StoragePath) -> None:
        self._folder = folder
        self._logs: list[dict[str, Any]] = []
        for file in self._files():
            if file.name == _batch(len(self._logs)):  # else a gathering was cut off: it is in the first
                self._logs += [json.loads(line) for line in _content(file).splitlines()]

    def _files(self) -> list[StoragePath]:
        """Batches, by their first line's number; what a killed writer left of one is none."""
        return [file for file in self._folder.children() if re.fullmatch(r"\d{8}\.jsonl", file.name)]

    def gather(self) -> None:
        """Make one object of what earlier drivers wrote."""
        self._folder.remove_partial_files()
        files = self._files()
        if len(files) < 2:
            return
        (self._folder / _batch(0)).write_bytes(_lines(self._logs))
        for file in files:
            if file.name != _batch(0):
                file.delete()

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """See BaseJournalBackend."""
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """See BaseJournalBackend."""
        file = self._folder / _batch(len(self._logs))
        retry(lambda: file.write_bytes(_lines(logs)), _RETRY_SECONDS, f"writing {file}")
        self._logs += logs


def _batch(first: int) -> str:
    return f"{first:08d}.jsonl"


def _content(file: StoragePath) -> bytes:
    """Empty where another driver has gathered it since it was listed."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""


def _lines(logs: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()


class VariantSearch(OptunaSearch):
    """The trials of one variant: those of its study that a killed driver left, then new ones.

    Reaches into OptunaSearch's study and trials (Ray 2.60): it has no way to go on with a trial that is there, and
    would tell a trial that was stopped early as complete.
    """

    def __init__(self, variant: Variant, search: Search, storage: BaseStorage, name: str, identity: str) -> None:
        self.variant, self.wanted = variant, search
        super().__init__(
            space={key: distribution(one) for key, one in search.space.items()},
            metric=list(search.objective),
            mode=list(search.objective.values()),
            study_name=name,
            storage=storage,
            sampler=_sampler(search, storage, name),
        )
        self._ot_study.set_user_attr(_OWNER, identity)
        if search.asha:
            self._ot_study.pruner = SuccessiveHalvingPruner(round(RUNGS * search.asha.grace), search.asha.reduction)
        self._worse = -1.0 if search.objective[self.metric[0]] == "max" else 1.0
        self._left = self._unended()

    def _unended(self) -> list[FrozenTrial]:
        """Trials that a killed driver left; one that it had not given all its settings is forgotten."""
        left = self._ot_study.get_trials(states=(TrialState.RUNNING,))
        for trial in left:
            if trial.params.keys() != self.wanted.space.keys():
                self._ot_study.tell(trial.number, state=TrialState.FAIL)
        return [trial for trial in left if trial.params.keys() == self.wanted.space.keys()]

    @property
    def tried(self) -> list[TrialRecord]:
        """All trials so far, those that run among them."""
        return _all_tried(self._ot_study, self.wanted)

    def next(self, trial_id: str, fresh: bool) -> dict[str, Any] | None:
        """See searcher.Source."""
        if self._left:
            frozen = self._left.pop(0)
            self._ot_trials[trial_id] = optuna.trial.Trial(self._ot_study, frozen._trial_id)
            return dict(frozen.params)
        if not fresh or (self.wanted.trials is not None and len(self.tried) >= self.wanted.trials):
            return None
        self.suggest(trial_id)
        return dict(self._ot_trials[trial_id].params)

    def should_stop(self, trial_id: str, mark: int, loss: float) -> bool:
        """Keep the loss that a trial reached at a mark (1 to RUNGS); whether successive halving ends the trial there.

        Kept so that less is better for the study's own direction, as its sampler and pruner will have it.
        """
        if len(self.metric) > 1:
            return False  # Optuna keeps no intermediate values of several objectives
        trial = self._ot_trials[trial_id]
        trial.report(self._worse * loss, mark)
        return self.wanted.asha is not None and mark < RUNGS and trial.should_prune()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study how a trial ended: done with `objective/NAME`s, failed with `failure`, or stopped early."""
        trial, told = self._ot_trials.pop(trial_id), result or {}
        values = [told.get(f"objective/{name}") for name in self.metric]
        if error or "failure" in told:
            trial.set_user_attr(_FAILURE, told.get("failure", LOST))
            self._ot_study.tell(trial, state=TrialState.FAIL)
        elif None in values:
            self._ot_study.tell(trial, state=TrialState.PRUNED)
        else:
            self._ot_study.tell(trial, values)


def _all_tried(study: Study, search: Search) -> list[TrialRecord]:
    """All trials but those that a killed driver had not given all their settings."""
    return [_tried(one, list(search.objective)) for one in study.trials if one.params.keys() == search.space.keys()]


def _tried(frozen: FrozenTrial, names: list[str]) -> TrialRecord:
    ended = {TrialState.COMPLETE: "done", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}.get(frozen.state)
    values = dict(zip(names, frozen.values, strict=True)) if ended == "done" else {}
    losses = {mark: abs(value) for mark, value in frozen.intermediate_values.items()}
    return TrialRecord(frozen.number, frozen.params, ended, frozen.user_attrs.get(_FAILURE), values, losses)


def _studies(storage: BaseStorage) -> dict[str, StudySummary]:
    return {study.study_name: study for study in optuna.get_all_study_summaries(storage)}


def _sampler(search: Search, storage: BaseStorage, name: str) -> BaseSampler:
    """Seeded by what was tried already as well: a sampler that starts anew would draw its first points again."""
    known = _studies(storage).get(name)
    tried = known.n_trials if known else 0
    seed = int(fingerprint("sampler", {"study": name, "seed": search.seed, "tried": tried})[:8], 16)
    if search.sampler == "random":
        return RandomSampler(seed=seed)
    return TPESampler(seed=seed, constant_liar=True)  # trials run side by side: not the same point for all
