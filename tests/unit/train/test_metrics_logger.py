"""What a run leaves to be seen: figures of each step, in files and in the trackers that the recipe names."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from raylava.config.recipe import Tracking, Training
from raylava.corpus.blocks import Lengths
from raylava.perf.shapes import LanguageShape, LlavaShape, VisionShape
from raylava.storage import storage_path
from raylava.train.batch_plan import Step
from raylava.train.data_loader import StepBatch
from raylava.train.engine import StepResult
from raylava.train.metrics import ThroughputMeter
from raylava.train.metrics_logger import METRICS, MetricsLogger
from raylava.train.trackers import TENSORBOARD

SHAPE = LlavaShape(LanguageShape(16, 32, 2, 2, 1, 8, 100), VisionShape(16, 32, 2, 14, 4, 5, True, False, 48))
LENGTHS = Lengths(*(np.array(values, dtype=np.int32) for values in ([10, 20, 30, 40], [1, 1, 0, 1], [2, 3, 4, 5])))


def telemetry(output: str, first: int = 0, tracking: Tracking | None = None) -> MetricsLogger:
    meter = ThroughputMeter(SHAPE, LENGTHS, Training(), language=True, device=torch.device("cpu"), world_size=1)
    return MetricsLogger(storage_path(output), first, meter, tracking or Tracking(), {"lr": 1e-3, "stage": "finetune"})


def add(to: MetricsLogger, number: int, loss: float) -> None:
    work = StepBatch(Step(number, 0, np.array([0, 1])), [], loss_tokens=5, tokens=30)
    to.add(work, StepResult(loss, None, 1e-3, seconds=1.5, skipped=False), waited=0.5, saving=0.25)


def metrics(output: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (storage_path(output) / METRICS).read_bytes().splitlines()]


def test_rates_count_the_whole_step_with_its_waiting(tmp_path: Path) -> None:
    seen = telemetry(str(tmp_path))
    add(seen, 0, loss=2.0)
    seen.close()
    (line,) = metrics(str(tmp_path))
    rates = ("samples_per_second", "tokens_per_second", "loss_tokens_per_second", "data_wait_fraction")
    assert [line[name] for name in rates] == [1.0, 15.0, 2.5, 0.25]
    assert line["checkpoint_stall_s"] == 0.25
    assert list((tmp_path / TENSORBOARD).glob("events*"))


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_a_resumed_run_goes_on_in_the_same_file_and_forgets_what_is_done_again(
    where: str, tmp_path: Path, s3: str
) -> None:
    output = str(tmp_path) if where == "disk" else f"{s3}/telemetry"
    first = telemetry(output)
    for number in range(4):
        add(first, number, loss=1.0)
    first.close()
    second = telemetry(output, first=2)
    add(second, 2, loss=0.5)
    second.close()
    assert [(line["step"], line["loss"]) for line in metrics(output)] == [(0, 1.0), (1, 1.0), (2, 0.5)]


def test_a_loss_that_is_not_finite_leaves_json_that_anyone_reads(tmp_path: Path) -> None:
    seen = telemetry(str(tmp_path))
    add(seen, 0, loss=float("nan"))
    seen.close()
    assert metrics(str(tmp_path))[0]["loss"] is None


def test_mlflow_gets_each_step_and_a_resumed_run_goes_on_in_its_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="pip install 'raylava[mlflow]'")
    database = f"sqlite:///{tmp_path}/mlflow.db"
    for first in (0, 1):
        seen = telemetry(str(tmp_path / "finetune" / "abc"), first, Tracking(mlflow=database))
        add(seen, first, loss=2.0 - first)
        seen.close()
    client = mlflow.MlflowClient(database)
    (run,) = client.search_runs([client.get_experiment_by_name("raylava").experiment_id])
    assert (run.info.run_name, run.data.params["stage"]) == ("finetune/abc", "finetune")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(0, 2.0), (1, 1.0)]


def test_weights_and_biases_gets_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install 'raylava[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen = telemetry(str(tmp_path / "finetune" / "abc"), tracking=Tracking(wandb="project"))
    add(seen, 0, loss=2.0)
    seen.close()
    (kept,) = (tmp_path / "raylava" / "wandb").rglob("*.wandb")
    assert b"loss_tokens_per_second" in kept.read_bytes()
