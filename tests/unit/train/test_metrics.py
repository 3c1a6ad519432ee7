"""The metrics of each step are written to metrics.jsonl and TensorBoard."""

from pathlib import Path

import pytest
import torch

from raylava.perf.flops import step_flops
from raylava.perf.hardware import peak_flops
from raylava.progress import format_metric
from raylava.train.metrics import TENSORBOARD, StepMetrics
from tests.support.metrics import (
    SHAPE,
    check_resumed_run_continues_the_file,
    log_step,
    measure_step,
    open_logger,
    read_metrics,
)


def test_rates_count_the_whole_step_including_the_wait_for_data(tmp_path: Path) -> None:
    logger = open_logger(str(tmp_path))
    log_step(logger, 0, loss=2.0)
    logger.close()
    (line,) = read_metrics(str(tmp_path))
    rates = ("samples_per_second", "tokens_per_second", "loss_tokens_per_second", "data_wait_fraction")
    assert [line[name] for name in rates] == [1.0, 15.0, 2.5, 0.25]
    assert line["checkpoint_stall_s"] == 0.25
    assert list((tmp_path / TENSORBOARD).glob("events*"))


def test_resumed_run_continues_the_same_file_and_drops_steps_that_are_computed_again(tmp_path: Path) -> None:
    check_resumed_run_continues_the_file(str(tmp_path))


def test_non_finite_loss_is_written_as_null(tmp_path: Path) -> None:
    logger = open_logger(str(tmp_path))
    log_step(logger, 0, loss=float("nan"))
    logger.close()
    assert read_metrics(str(tmp_path))[0]["loss"] is None


def test_model_flops_utilization_is_the_required_share_of_a_known_gpus_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples with two images in two seconds, on a GPU whose name is known; None on a CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("raylava.train.metrics.memory_gb", lambda device: 0.0)
    flops = step_flops(SHAPE, [10, 20], 2, 5, language=True, vision=False).total
    peak = peak_flops("NVIDIA H100 80GB HBM3")
    assert peak is not None
    assert measure_step(0, 1.0, torch.device("cuda")).mfu == pytest.approx(flops / 2.0 / peak)
    assert measure_step(0, 1.0, torch.device("cpu")).mfu is None


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.04, "loss 2.00  18,130 tokens/s"), (0.25, "loss 2.00  18,130 tokens/s  waiting for data 25 %")],
)
def test_progress_shows_loss_and_speed_and_a_wait_for_data_above_5_percent(share: float, shown: str) -> None:
    times = {"step_time_s": 0.5, "data_wait_fraction": share, "checkpoint_stall_s": 0.0}
    rates = {"samples_per_second": 8.0, "tokens_per_second": 18130.2, "loss_tokens_per_second": 900.0}
    metrics = StepMetrics(
        step=0, loss=2.001, lr=1e-5, grad_norm=1.0, mfu=0.3, memory_gb=1.0, skipped=False, **times, **rates
    )
    assert "  ".join(format_metric(name, value) for name, value in metrics.progress_metrics().items()) == shown
