"""The metrics of each step reach a bucket, MLflow and W&B."""

import time
from pathlib import Path

import pytest

from raylava.config.recipe import Tracking
from tests.support.metrics import check_resumed_run_continues_the_file, log_step, open_logger


def test_resumed_run_continues_the_same_file_in_a_bucket(s3: str) -> None:
    check_resumed_run_continues_the_file(f"{s3}/telemetry")


def test_mlflow_receives_each_step_and_a_resumed_run_continues_its_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="pip install 'raylava[mlflow]'")
    database = f"sqlite:///{tmp_path}/mlflow.db"
    for step in (0, 1):
        logger = open_logger(str(tmp_path / "finetune" / "abc"), step, Tracking(mlflow=database))
        log_step(logger, step, loss=2.0 - step)
        logger.close()
    client = mlflow.MlflowClient(database)
    (run,) = client.search_runs([client.get_experiment_by_name("raylava").experiment_id])
    assert (run.info.run_name, run.data.params["stage"]) == ("finetune/abc", "finetune")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(0, 2.0), (1, 1.0)]


def test_weights_and_biases_receives_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install 'raylava[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    logger = open_logger(str(tmp_path / "finetune" / "abc"), tracking=Tracking(wandb="project"))
    log_step(logger, 0, loss=2.0)
    logger.close()
    (file,) = (tmp_path / "raylava" / "wandb").rglob("*.wandb")
    deadline = time.monotonic() + 10
    while b"loss_tokens_per_second" not in file.read_bytes():  # W&B's service may flush shortly after finish() returns
        assert time.monotonic() < deadline
        time.sleep(0.02)
