"""Where figures are drawn: TensorBoard always, Weights & Biases and MLflow where the recipe names them.

Both are extras (`pip install 'raylava[wandb]'`, `'raylava[mlflow]'`) and take their credentials from the environment.
A resumed run goes on in the same run of each. What cannot be told to a server is a warning, never an end of training.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from raylava.config.recipe import Tracking
from raylava.errors import first_line
from raylava.storage import cache_folder

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"


class Tracker(Protocol):
    """Takes a step's figures by name."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One step."""

    def flush(self) -> None:
        """What was added is written."""

    def close(self) -> None:
        """The run is over."""


def trackers(tracking: Tracking, folder: Path, run: str, settings: Mapping[str, Any], first: int) -> list[Tracker]:
    """The trackers of a run that starts at step `first`. `run` names it; TensorBoard's files go below `folder`."""
    chosen: list[Tracker] = [TensorBoard(folder / TENSORBOARD, first)]
    if tracking.wandb:
        chosen.append(WeightsAndBiases(tracking.wandb, run, settings))
    if tracking.mlflow:
        chosen.append(MLflow(tracking.mlflow, run, settings))
    return chosen


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: Path, first: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first or None)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a figure."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Written to the files."""
        self._writer.flush()

    def close(self) -> None:
        """No more."""
        self._writer.close()


class WeightsAndBiases:
    """A run of a W&B project. What it has not sent lies in raylava's cache folder, for `wandb sync`."""

    def __init__(self, project: str, run: str, settings: Mapping[str, Any]) -> None:
        import wandb

        name = run.replace("/", "-")
        folder = cache_folder() / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project, id=name, name=name, resume="allow", dir=str(folder), config=dict(settings)
        )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One row. W&B refuses to go back: steps that are done again after a resume are left as they were."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """W&B writes as it goes."""

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


class MLflow:
    """A run of the experiment `raylava` on a tracking server, database or folder."""

    def __init__(self, uri: str, run: str, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(uri)
        self._failing = False
        self._run = self._find(run) or self._create(run, settings)

    def _find(self, run: str) -> str | None:
        experiment = self._client.get_experiment_by_name("raylava")
        if experiment is None:
            return None
        found = self._client.search_runs([experiment.experiment_id], f"tags.`raylava.run` = '{run}'")
        return found[0].info.run_id if found else None

    def _create(self, run: str, settings: Mapping[str, Any]) -> str:
        experiment = self._client.get_experiment_by_name("raylava")
        identity = experiment.experiment_id if experiment else self._client.create_experiment("raylava")
        made = self._client.create_run(identity, tags={"raylava.run": run}, run_name=run).info.run_id
        for name, value in settings.items():
            self._client.log_param(made, name, value)
        return str(made)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One batch of metrics."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        now = int(time.time() * 1000)
        try:
            self._client.log_batch(self._run, [Metric(name, float(value), now, step) for name, value in values.items()])
        except MlflowException as error:
            if not self._failing:
                logger.warning("MLflow does not take the figures: %s", first_line(error))
            self._failing = True

    def flush(self) -> None:
        """MLflow's client writes at once."""

    def close(self) -> None:
        """The run is finished."""
        self._client.set_terminated(self._run)
