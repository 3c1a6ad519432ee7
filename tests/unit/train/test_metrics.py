"""The metrics of each step are written to metrics.jsonl and TensorBoard."""

from pathlib import Path

import pytest
import torch

from raylava.perf.flops import step_flops
from raylava.perf.hardware import peak_flops
from raylava.train.metrics import TENSORBOARD
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
