"""Metrics of synthetic steps, for tests of what a run logs."""

import json

import numpy as np
import torch

from raylava.config.recipe import Tracking, Training
from raylava.corpus.blocks import Lengths
from raylava.perf.shapes import LanguageShape, LlavaShape, VisionShape
from raylava.storage import storage_path
from raylava.train.batch_plan import Step
from raylava.train.data_loader import StepBatch
from raylava.train.engine import StepResult
from raylava.train.metrics import MetricsLogger, StepMetrics, ThroughputMeter
from raylava.train.step_log import METRICS_LOG

SHAPE = LlavaShape(LanguageShape(16, 32, 2, 2, 1, 8, 100), VisionShape(16, 32, 2, 14, 4, 5, True, False, 48))
LENGTHS = Lengths(*(np.array(values, dtype=np.int32) for values in ([10, 20, 30, 40], [1, 1, 0, 1], [2, 3, 4, 5])))


def open_logger(output: str, first_step: int = 0, tracking: Tracking | None = None) -> MetricsLogger:
    """Return a logger of a finetuning run that starts or resumes at `first_step`."""
    settings = {"lr": 1e-3, "stage": "finetune"}
    return MetricsLogger(storage_path(output), first_step, tracking or Tracking(), settings)


def log_step(logger: MetricsLogger, number: int, loss: float) -> None:
    """Log a step of `measure_step`."""
    logger.add(measure_step(number, loss, torch.device("cpu")))


def measure_step(number: int, loss: float, device: torch.device) -> StepMetrics:
    """Measure a step of two samples that computed for 1.5 s, after 0.5 s for its data and 0.25 s for a checkpoint."""
    meter = ThroughputMeter(SHAPE, LENGTHS, Training(), language=True, device=device, world_size=1)
    batch = StepBatch(Step(number, 0, np.array([0, 1])), [], loss_tokens=5, tokens=30)
    result = StepResult(loss, None, 1e-3, seconds=1.5, skipped=False, request=0)
    return meter.measure(batch, result, data_wait_s=0.5, checkpoint_stall_s=0.25)


def read_metrics(output: str) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (storage_path(output) / METRICS_LOG).read_bytes().splitlines()]


def check_resumed_run_continues_the_file(output: str) -> None:
    """Assert that a run that resumes at step 2 keeps the steps before it and replaces the later ones."""
    first_attempt = open_logger(output)
    for number in range(4):
        log_step(first_attempt, number, loss=1.0)
    first_attempt.close()
    second_attempt = open_logger(output, first_step=2)
    log_step(second_attempt, 2, loss=0.5)
    second_attempt.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(output)] == [(0, 1.0), (1, 1.0), (2, 0.5)]
