"""The search of one variant: an Optuna study that outlives the driver; tune/searcher.py runs its trials.

The study is the only state of a search. It is stored in a database, or as Optuna's journal in the sweep's folder on any
filesystem. A trial that was running when its driver was killed is started again with the same settings, so that its
artifacts and checkpoints are reused. A trial stopped early is recorded as pruned, with its intermediate losses.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.study import Study, StudyDirection, StudySummary
from optuna.trial import FrozenTrial, Trial, TrialState

from raylava.artifacts import fingerprint
from raylava.errors import UserError
from raylava.storage import StoragePath, retry
from raylava.tune.sweep import SearchConfig, SearchRange
from raylava.tune.variants import LOST, TrialRecord, Variant

RUNGS = 10  # points in a trial's finetuning at which its loss is compared with other trials
_FAILURE = "failure"  # user attribute of a failed trial: the error message
_OWNER = "raylava"  # user attribute of a study: the identity of the search that it belongs to
_JOURNAL = "study"
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_DIRECTIONS = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}
_RETRY_SECONDS = 600.0  # time-out for writing the journal to failing storage


def _variable(name: "re.Match[str]") -> str:
    """Return the value of an environment variable, which may itself contain dollar signs."""
    key = name[1] or name[2]
    if key not in os.environ:
        raise UserError(f"search.study_storage: environment variable {key} is not set; set it on the driver's machine")
    return os.environ[key].replace("{", "{{").replace("}", "}}")  # Optuna formats the URL


def distribution(search_range: SearchRange) -> BaseDistribution:
    """Return the Optuna distribution of a search range."""
    if search_range.loguniform:
        return FloatDistribution(*search_range.loguniform, log=True)
    if search_range.uniform:
        return FloatDistribution(*search_range.uniform)
    if search_range.integer:
        return IntDistribution(*search_range.integer)
    assert search_range.choice is not None
    return CategoricalDistribution(search_range.choice)


def distributions(search: SearchConfig) -> dict[str, BaseDistribution]:
    """Return the search space as Optuna distributions by recipe key."""
    return {key: distribution(search_range) for key, search_range in search.space.items()}


def sample_settings(search: SearchConfig, count: int) -> list[dict[str, Any]]:
    """Draw `count` random points of the search space without recording them; used to plan a search before it starts."""
    study = optuna.create_study(sampler=RandomSampler(seed=search.seed))
    space = distributions(search)
    return [study.ask(fixed_distributions=space).params for _ in range(count)]


class StudyRegistry:
    """The studies of a sweep's search, one per variant, in a database or in the sweep's folder."""

    def __init__(
        self, search: SearchConfig, name: str, folder: StoragePath, describe: Callable[[Variant], Any]
    ) -> None:
        """`name` is the prefix of the studies' names and `folder` the sweep's folder.

        `describe` returns what a variant's results depend on, as a JSON-serializable value.
        """
        self._search, self._name, self._folder, self._describe = search, name, folder, describe

    def load_trials(self, variant: Variant) -> list[TrialRecord]:
        """Return the trials of a variant, read-only: a driver may be running the study at the same time.

        Raises UserError for a database that cannot be opened, and for a study that belongs to another search.
        """
        storage, name = self._read_only_storage, self._study_name(variant)
        if name not in _study_summaries(storage):
            return []
        self._check_owner(storage, name, variant)
        study = optuna.load_study(study_name=name, storage=storage)
        return _trial_records(study, self._search)

    @cached_property
    def _read_only_storage(self) -> BaseStorage:
        return self._open_storage(StorageJournal(self._folder / _JOURNAL))

    def resume_studies(self, variants: Sequence[Variant]) -> "list[VariantStudy]":
        """Create or resume the studies of the variants as their only driver. Raises the errors of `load_trials`."""
        journal = StorageJournal(self._folder / _JOURNAL)
        journal.compact()
        storage = self._open_storage(journal)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        studies = []
        for variant in variants:
            name = self._study_name(variant)
            self._check_owner(storage, name, variant)
            studies.append(VariantStudy(variant, self._search, storage, name, self._identity(variant)))
        return studies

    def _open_storage(self, journal: "StorageJournal") -> BaseStorage:
        if self._search.study_storage is None:
            return JournalStorage(journal)
        url = _VARIABLE.sub(_variable, self._search.study_storage)
        try:
            return RDBStorage(url)
        except Exception as error:  # the driver's error may contain the URL's password: neither logged nor chained
            raise UserError(
                f"search.study_storage: cannot open the database ({type(error).__name__}); "
                "check its URL and your permissions"
            ) from None

    def _study_name(self, variant: Variant) -> str:
        return "/".join([self._name, *variant.name.split()])

    def _identity(self, variant: Variant) -> str:
        """Return the fingerprint of everything a study's results depend on and of the sweep's location.

        Budgets are not part of it, so that a study can be extended.
        """
        search = self._search.model_dump(mode="json", exclude={"trials", "hours", "max_cost", "study", "study_storage"})
        return fingerprint("study", {"search": search, "about": self._describe(variant), "sweep": self._folder.uri})

    def _check_owner(self, storage: BaseStorage, name: str, variant: Variant) -> None:
        """Refuse a study of another search: the sampler would learn from trials that are not comparable."""
        study = _study_summaries(storage).get(name)
        if study is not None and study.n_trials and study.user_attrs.get(_OWNER) != self._identity(variant):
            raise UserError(
                f"search.study: the study {name!r} already exists and belongs to another search (space, objective, "
                "sampler, recipe, data or --storage differ); set search.study to another name"
            )


class StorageJournal(BaseJournalBackend):
    """Optuna journal in a folder of any filesystem, for one driver at a time (guarded by the sweep's lock).

    Each batch of log lines is a new file named by the number of its first line, so that nothing is ever rewritten.
    """

    def __init__(self, folder: StoragePath) -> None:
        self._folder = folder
        self._logs: list[dict[str, Any]] = []
        for file in self._batch_files():
            # Any other number belongs to a batch that an interrupted compaction has merged into the first file.
            if file.name == _batch_name(len(self._logs)):
                self._logs += [json.loads(line) for line in _read_or_empty(file).splitlines()]

    def _batch_files(self) -> list[StoragePath]:
        """Return the batches ordered by their first line; partial files of a killed writer do not match."""
        return [file for file in self._folder.children() if re.fullmatch(r"\d{8}\.jsonl", file.name)]

    def compact(self) -> None:
        """Merge the batches of earlier drivers into one file and remove their partial files."""
        self._folder.remove_partial_files()
        files = self._batch_files()
        if len(files) < 2:
            return
        (self._folder / _batch_name(0)).write_bytes(_to_lines(self._logs))
        for file in files:
            if file.name != _batch_name(0):
                file.delete()

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """See BaseJournalBackend."""
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """See BaseJournalBackend."""
        file = self._folder / _batch_name(len(self._logs))
        retry(lambda: file.write_bytes(_to_lines(logs)), _RETRY_SECONDS, f"writing {file}")
        self._logs += logs


def _batch_name(first_line: int) -> str:
    return f"{first_line:08d}.jsonl"


def _read_or_empty(file: StoragePath) -> bytes:
    """Return the file's content, or nothing if another driver has compacted it since it was listed."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""


def _to_lines(logs: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()


class VariantStudy:
    """The study of one variant as a source of trials: first those interrupted with an earlier driver, then new ones."""

    def __init__(self, variant: Variant, search: SearchConfig, storage: BaseStorage, name: str, identity: str) -> None:
        """Create the study, or open it. `identity` is that of the search that it belongs to."""
        self.variant, self.search, self._storage, self._objectives = variant, search, storage, list(search.objective)
        self.study = optuna.create_study(
            study_name=name,
            storage=storage,
            directions=[_DIRECTIONS[mode] for mode in search.objective.values()],
            sampler=_create_sampler(search, storage, name),
            pruner=NopPruner(),  # Ray Tune stops trials, see early_stopping.py
            load_if_exists=True,
        )
        self.study.set_user_attr(_OWNER, identity)
        self._loss_sign = -1.0 if search.objective[self._objectives[0]] == "max" else 1.0
        self._running: dict[str, Trial] = {}
        self._interrupted = self._interrupted_trials()

    def _interrupted_trials(self) -> list[FrozenTrial]:
        """Return the trials left running by a killed driver; fail those without a value for every searched setting."""
        running = self.study.get_trials(states=(TrialState.RUNNING,))
        for trial in running:
            if trial.params.keys() != self.search.space.keys():
                self.study.tell(trial.number, state=TrialState.FAIL)
        return [trial for trial in running if trial.params.keys() == self.search.space.keys()]

    @property
    def trials(self) -> list[TrialRecord]:
        """Return all trials of the study, including those that are running."""
        return _trial_records(self.study, self.search)

    def next_settings(self, trial_id: str, allow_new: bool) -> dict[str, Any] | None:
        """See searcher.TrialSource."""
        if self._interrupted:
            self._running[trial_id] = self._continued_trial(self._interrupted.pop(0).number)
        elif not allow_new or (self.search.trials is not None and len(self.trials) >= self.search.trials):
            return None
        else:
            self._running[trial_id] = self.study.ask(fixed_distributions=distributions(self.search))
        return dict(self._running[trial_id].params)

    def _continued_trial(self, number: int) -> Trial:
        """Return the study's running trial of this number, as `ask` returned it to another driver."""
        study = self._storage.get_study_id_from_name(self.study.study_name)
        return Trial(self.study, self._storage.get_trial_id_from_study_id_trial_number(study, number))

    def state(self) -> dict[str, Any]:
        """Return the study's running trials by Ray Tune's trial id; everything else is in the study's storage."""
        return {"running": {trial_id: trial.number for trial_id, trial in self._running.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue with the running trials of a saved state, instead of starting them again as interrupted ones."""
        numbers = set(state["running"].values())
        self._interrupted = [trial for trial in self._interrupted if trial.number not in numbers]
        self._running = {trial_id: self._continued_trial(number) for trial_id, number in state["running"].items()}

    def record_loss(self, trial_id: str, rung: int, loss: float) -> None:
        """Record a trial's loss at a rung (1 to RUNGS).

        The loss is recorded with the sign for which the study's direction prefers smaller losses: Optuna's sampler
        ranks the intermediate values of stopped trials by that direction.
        """
        if len(self._objectives) == 1:  # Optuna does not store intermediate values of multi-objective studies
            self._running[trial_id].report(self._loss_sign * loss, rung)

    def finished_losses(self) -> list[Mapping[int, float]]:
        """See searcher.TrialSource."""
        return [trial.losses for trial in self.trials if trial.outcome]

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Record the outcome of a trial in the study.

        A result with `objective/NAME` values is done, one with `failure` has failed, any other was stopped early.
        """
        trial, report = self._running.pop(trial_id), result or {}
        values = [report[key] for key in (f"objective/{name}" for name in self._objectives) if key in report]
        if error or "failure" in report:
            trial.set_user_attr(_FAILURE, report.get("failure", LOST))
            self.study.tell(trial, state=TrialState.FAIL)
        elif len(values) < len(self._objectives):
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, values)


def _trial_records(study: Study, search: SearchConfig) -> list[TrialRecord]:
    """Return the study's trials, without those that a killed driver left with incomplete settings."""
    names = list(search.objective)
    return [_trial_record(trial, names) for trial in study.trials if trial.params.keys() == search.space.keys()]


def _trial_record(frozen: FrozenTrial, names: list[str]) -> TrialRecord:
    outcome = {TrialState.COMPLETE: "done", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}.get(frozen.state)
    objectives = dict(zip(names, frozen.values, strict=True)) if outcome == "done" else {}
    losses = {rung: abs(value) for rung, value in frozen.intermediate_values.items()}
    return TrialRecord(frozen.number, frozen.params, outcome, frozen.user_attrs.get(_FAILURE), objectives, losses)


def _study_summaries(storage: BaseStorage) -> dict[str, StudySummary]:
    return {study.study_name: study for study in optuna.get_all_study_summaries(storage)}


def _create_sampler(search: SearchConfig, storage: BaseStorage, name: str) -> BaseSampler:
    """Create a sampler whose seed includes the number of trials so far: a resumed search must not repeat its points."""
    summary = _study_summaries(storage).get(name)
    trial_count = summary.n_trials if summary else 0
    seed = int(fingerprint("sampler", {"study": name, "seed": search.seed, "tried": trial_count})[:8], 16)
    if search.sampler == "random":
        return RandomSampler(seed=seed)
    return TPESampler(seed=seed, constant_liar=True)  # trials run concurrently: avoids suggesting the same point twice
