"""Ray Train restarts a worker group that lost a worker, and ends a run whose worker raised an error."""

import json
import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import torch
import torch.distributed
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from raylava.cluster.gauges import Gauges
from raylava.config.recipe import Resources, Training
from raylava.errors import RunError
from raylava.models.registry import ResolvedModel
from raylava.perf.memory import ExecutionConfig
from raylava.progress import NullProgressBar
from raylava.storage import storage_path
from raylava.train.backend import COMPUTING, LOADING
from raylava.train.process_environment import process_environment
from raylava.train.ray import driver
from raylava.train.ray.driver import report_progress
from raylava.train.ray.failures import RestartPolicy
from raylava.train.ray.monitor import RunMonitor
from raylava.train.ray.worker import record_errors
from raylava.train.spec import TrainSpec

pytestmark = pytest.mark.usefixtures("ray_cluster")


def log_attempt(config: dict[str, Any]) -> None:
    with (Path(config["folder"]) / f"rank-{ray.train.get_context().get_world_rank()}").open("a") as file:
        file.write(f"{os.getpid()}\n")


def fail_while_the_peer_waits(config: dict[str, Any]) -> None:
    """Rank 1 raises an error; rank 0's collective then fails because its peer is gone."""
    log_attempt(config)
    with record_errors(config["monitor"]):
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 1:
            raise ValueError("sample 17 is broken\nits second line")
        torch.distributed.barrier()


def record_environment(folder: Path, config: dict[str, Any]) -> None:
    """Write the worker's environment."""
    (folder / "environment.json").write_text(json.dumps(dict(os.environ)))


def reject_the_first_configuration(config: dict[str, Any]) -> None:
    """Fail as the Trainer does whose memory dry run failed, unless the run has rejected a configuration before."""
    if not config["spec"].rejected_configs:
        ray.get(config["monitor"].reject_config.remote(ExecutionConfig(0, False, False, False, 4096)))
        raise RunError("out of memory")
    (Path(config["spec"].output) / "rejected").write_text(config["spec"].rejected_configs[0].description)


def die_without_a_checkpoint(config: dict[str, Any]) -> None:
    log_attempt(config)
    for _ in range(2):  # the second report waits until the controller has taken the first, and so monitors the worker
        ray.train.report({})
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_the_checkpoints_but_the_last(config: dict[str, Any]) -> None:
    """The first three attempts save a checkpoint before they die, the last one succeeds."""
    log_attempt(config)
    attempt = len((Path(config["folder"]) / "rank-0").read_text().splitlines())
    if attempt == 4:
        return
    folder = Path(config["folder"]) / f"checkpoint-{attempt}"
    folder.mkdir()
    ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(folder))
    ray.train.get_all_reported_checkpoints()  # waits until the controller has recorded it
    os.kill(os.getpid(), signal.SIGKILL)


def attempts(folder: Path) -> list[int]:
    """Return how often each rank was started."""
    return [len(file.read_text().splitlines()) for file in sorted((folder / "attempts").glob("rank-*"))]


def fit(loop: Any, folder: Path, workers: int, max_failures: int) -> Any:
    """Run the loop with the policy of raylava's own runs; return the monitor."""
    (folder / "attempts").mkdir()
    monitor = RunMonitor.remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        loop,
        train_loop_config={"folder": str(folder / "attempts"), "monitor": monitor},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(
            name="run",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[RestartPolicy(monitor, max_failures)],
        ),
    )
    trainer.fit()
    return monitor


def test_workers_of_a_deterministic_run_have_its_environment(
    resolved_model: ResolvedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "train_loop_per_worker", partial(record_environment, tmp_path))
    training = Training(deterministic=True)
    spec = TrainSpec("finetune", resolved_model, training, 0, "", None, "pad", str(tmp_path / "finetune" / "f"))
    driver.build_trainer(spec, Resources(), RunMonitor.remote()).fit()  # type: ignore[attr-defined]
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert process_environment(training).items() <= environment.items()
    assert "NCCL_ALGO" in environment


def test_run_whose_dry_run_fails_starts_again_with_less_memory(
    resolved_model: ResolvedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(driver, "train_loop_per_worker", reject_the_first_configuration)
    output = tmp_path / "finetune" / "f"
    output.mkdir(parents=True)
    spec = TrainSpec("finetune", resolved_model, Training(), 0, "", None, "pad", str(output))
    driver.fit(spec, Resources(), RunMonitor.remote(), storage_path(output) / "none")  # type: ignore[attr-defined]
    assert (output / "rejected").read_text() == "ZeRO 0, packs of 4,096"
    assert "finetune: out of memory with ZeRO 0, packs of 4,096; starting again with less" in caplog.text


def test_error_of_one_worker_ends_the_run_at_once_with_that_worker_as_the_cause(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailedError, match="worker 1: ValueError: sample 17 is broken") as failure:
        fit(fail_while_the_peer_waits, tmp_path, workers=2, max_failures=1)
    assert "second line" not in str(failure.value)
    assert attempts(tmp_path) == [1, 1], "no worker is started again"


def test_run_that_loses_its_worker_again_and_again_without_a_checkpoint_ends(tmp_path: Path) -> None:
    message = re.escape("lost worker 0; 2 failures without a new checkpoint between them")
    with pytest.raises(TrainingFailedError, match=message):
        fit(die_without_a_checkpoint, tmp_path, workers=1, max_failures=1)
    assert attempts(tmp_path) == [2]


def test_run_that_saves_checkpoints_may_lose_workers_any_number_of_times(tmp_path: Path) -> None:
    monitor = fit(die_after_the_checkpoints_but_the_last, tmp_path, workers=1, max_failures=1)
    assert attempts(tmp_path) == [4]
    assert ray.get(monitor.poll.remote(60.0)).losses == [["worker 0"]] * 3, "each restart is reported to the driver"


def test_stalled_rank_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    monitor = RunMonitor.remote()  # type: ignore[attr-defined]
    ray.get(monitor.report.remote(0, 7, COMPUTING, 900.0, []))
    ray.get(monitor.report.remote(1, 6, LOADING, 700.0, []))
    with report_progress(monitor, NullProgressBar(), "finetune", Gauges("run", "finetune")):
        pass  # polls once more at its end
    assert "finetune is stalled: rank 1 has been waiting for data in step 6 for 7" in caplog.text


def test_lost_workers_are_reported_when_they_are_restarted(caplog: pytest.LogCaptureFixture) -> None:
    monitor = RunMonitor.remote()  # type: ignore[attr-defined]
    ray.get(monitor.record_loss.remote(["worker 2"]))
    with report_progress(monitor, NullProgressBar(), "finetune", Gauges("run", "finetune")):
        pass
    assert "finetune: lost worker 2; resuming from the last checkpoint" in caplog.text


def test_policy_ends_the_run_after_its_number_of_failures_and_does_not_count_preemptions() -> None:
    policy = RestartPolicy(RunMonitor.remote(), max_failures=1)  # type: ignore[attr-defined]
    preempted = RayActorError(preempted=True)
    for _ in range(3):
        policy.after_exception(None, {0: preempted})
    policy.after_exception(None, {1: RayActorError()})
    with pytest.raises(RunError, match="lost worker 1; 2 failures without a new checkpoint between them"):
        policy.after_exception(None, {1: RayActorError()})


def test_error_beside_the_death_of_another_worker_restarts_and_ends_the_run_when_it_recurs_alone() -> None:
    monitor = RunMonitor.remote()  # type: ignore[attr-defined]
    policy = RestartPolicy(monitor)
    error = ValueError("no route to host")
    ray.get(monitor.record_error.remote(0, "ValueError: no route to host"))
    policy.after_exception(None, {0: error, 1: RayActorError()})
    ray.get(monitor.record_error.remote(0, "ValueError: no route to host"))
    with pytest.raises(RunError, match="worker 0: ValueError: no route to host"):
        policy.after_exception(None, {0: error})
