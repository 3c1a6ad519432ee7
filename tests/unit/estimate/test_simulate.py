"""Simulated runs agree with the theory of checkpoint intervals and with published runs."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylava.estimate.simulate import (
    FailureModel,
    TrainingRun,
    best_interval,
    daly_interval,
    mean_goodput,
    mean_time_between_failures,
    scale_run,
    simulate_run,
    straggler_factor,
    worthwhile_size,
    young_interval,
)
from raylava.perf.hardware import DEVICES

NO_FAILURES = FailureModel(failures_per_node_day=0, jitter=0, restart_s=0, detection_s=0)
FREQUENT_FAILURES = FailureModel(
    failures_per_node_day=1.0, elastic=False, replacement_s=0, restart_s=0, detection_s=0, jitter=0
)
RUN = TrainingRun(
    nodes=8,
    workers=64,
    step_time_s=1.0,
    steps=20_000,
    checkpoint_stall_s=2.0,
    upload_s=0.0,
    checkpoint_interval_s=600.0,
)


def test_without_failures_a_run_takes_its_steps_and_its_checkpoints() -> None:
    outcome = simulate_run(RUN, NO_FAILURES, seed=0)
    assert outcome.finished
    assert outcome.node_losses == 0
    assert outcome.total_s == pytest.approx(20_000 + 33 * 2.0)
    assert outcome.goodput == pytest.approx(20_000 / 20_066)


def test_equal_seeds_give_equal_runs() -> None:
    assert simulate_run(RUN, FREQUENT_FAILURES, seed=3) == simulate_run(RUN, FREQUENT_FAILURES, seed=3)
    assert simulate_run(RUN, FREQUENT_FAILURES, seed=3) != simulate_run(RUN, FREQUENT_FAILURES, seed=4)


@settings(max_examples=30)
@given(st.floats(0, 5), st.floats(10, 5_000), st.integers(0, 100), st.booleans())
def test_the_total_time_is_productive_work_plus_accounted_overheads(
    failure_rate: float, interval: float, seed: int, elastic: bool
) -> None:
    failures = replace(FailureModel(failures_per_node_day=failure_rate, jitter=0), elastic=elastic)
    run = replace(RUN, checkpoint_interval_s=interval, upload_s=20.0)
    outcome = simulate_run(run, failures, seed)
    assert outcome.finished
    productive = outcome.total_s - outcome.lost_work_s - outcome.checkpoint_stall_s - outcome.downtime_s
    assert productive >= 20_000 * (1 - 1e-9)
    assert productive == pytest.approx(20_000, rel=1e-6) or (elastic and outcome.node_losses)
    assert 0 < outcome.goodput <= 1


def test_more_failures_lower_the_goodput() -> None:
    rates = [
        mean_goodput(RUN, replace(FREQUENT_FAILURES, failures_per_node_day=rate)) for rate in (0.0, 1.0, 5.0, 20.0)
    ]
    assert rates == sorted(rates, reverse=True)


def test_continuing_on_the_remaining_nodes_is_faster_than_waiting_for_replacements() -> None:
    failures = FailureModel(failures_per_node_day=2.0, replacement_s=7200.0)
    waiting, elastic = (
        sum(simulate_run(RUN, replace(failures, elastic=is_elastic), seed).total_s for seed in range(8))
        for is_elastic in (False, True)
    )
    assert elastic < waiting


@pytest.mark.parametrize("checkpoint_stall_s", [2.0, 20.0])
def test_the_best_interval_agrees_with_young_and_daly(checkpoint_stall_s: float) -> None:
    """Under their assumptions: free restarts and a constant failure rate.

    Goodput is flat around its maximum, so the goodput at each interval is compared.
    """
    run = replace(RUN, checkpoint_stall_s=checkpoint_stall_s, steps=200_000)
    mtbf_s = mean_time_between_failures(run, FREQUENT_FAILURES)
    assert mtbf_s == pytest.approx(86_400 / 8)
    best = best_interval(run, FREQUENT_FAILURES)
    assert 0.4 < best / young_interval(checkpoint_stall_s, mtbf_s) < 2.5
    for interval in (young_interval(checkpoint_stall_s, mtbf_s), daly_interval(checkpoint_stall_s, mtbf_s)):
        assert mean_goodput(replace(run, checkpoint_interval_s=interval), FREQUENT_FAILURES) == pytest.approx(
            mean_goodput(replace(run, checkpoint_interval_s=best), FREQUENT_FAILURES), abs=0.01
        )


def test_the_expected_overhead_agrees_with_theory() -> None:
    """First order: one checkpoint per interval, and half an interval lost per failure (Young 1974)."""
    run = replace(RUN, steps=400_000)
    mtbf_s = mean_time_between_failures(run, FREQUENT_FAILURES)
    expected = run.checkpoint_stall_s / run.checkpoint_interval_s + run.checkpoint_interval_s / 2 / mtbf_s
    assert 1 - mean_goodput(run, FREQUENT_FAILURES) == pytest.approx(expected, rel=0.15)


def test_a_returning_node_costs_the_work_since_the_last_checkpoint() -> None:
    failures = FailureModel(
        failures_per_node_day=0.5, elastic=True, replacement_s=500.0, restart_s=0.0, detection_s=0.0, jitter=0.0
    )
    for seed in range(8):
        outcome = simulate_run(replace(RUN, checkpoint_interval_s=1e9, checkpoint_stall_s=0.0), failures, seed)
        if outcome.node_losses:
            assert outcome.lost_work_s > 0
            return
    pytest.fail("no run lost a node")


def test_an_elastic_run_on_one_node_waits_for_the_replacement() -> None:
    failures = FailureModel(
        failures_per_node_day=20.0, elastic=True, replacement_s=3600.0, restart_s=0.0, detection_s=0.0, jitter=0.0
    )
    outcome = simulate_run(replace(RUN, nodes=1), failures, seed=0)
    assert outcome.node_losses > 0
    assert outcome.downtime_s == pytest.approx(3600.0 * outcome.node_losses)


def test_the_straggler_factor_grows_with_the_number_of_workers() -> None:
    factors = [straggler_factor(0.02, workers) for workers in (1, 8, 512, 4096)]
    assert factors == sorted(factors)
    assert factors[0] == 1.0
    assert factors[-1] < 1.1


def test_the_goodput_of_llama_3_405b_is_above_ninety_percent() -> None:
    """Dubey et al. 2024, section 3.3.4: 16,384 H100, 54 days, 419 unexpected interruptions and 47 planned ones, more
    than 90 % effective time. Checkpoints of 405 G parameters × 14 bytes go to storage at 2 TB/s; the duration of a
    restart is not published.
    """
    failures = FailureModel(
        failures_per_node_day=466 / 54 / 2048, elastic=False, replacement_s=0.0, restart_s=480.0, detection_s=60.0
    )
    run = TrainingRun(
        nodes=2048,
        workers=16_384,
        step_time_s=6.0,
        steps=int(54 * 86_400 / 6.0),
        checkpoint_stall_s=1.0,
        upload_s=405e9 * 14 / 2e12,
        checkpoint_interval_s=600.0,
    )
    outcomes = [simulate_run(run, failures, seed) for seed in range(4)]
    assert 0.90 < sum(outcome.goodput for outcome in outcomes) / 4 < 0.97
    assert sum(outcome.node_losses for outcome in outcomes) / 4 == pytest.approx(466, rel=0.15)


# Tokens/s per GPU (mosaicml/llm-foundry, scripts/train/benchmarking/README.md, commit 061f2c7): MPT, sequences of
# 2,048 tokens, FSDP with full sharding. By (device, parameters, sequences per micro-batch, activation checkpointing).
MPT: dict[tuple[str, float, int, bool], dict[int, float]] = {
    ("h100", 1.316e9, 20, False): {16: 46_037, 32: 45_130, 64: 44_402},
    ("h100", 12.854e9, 2, False): {8: 4_792, 16: 4_767, 32: 4_811, 64: 4_800},
    ("a100-40", 6.659e9, 18, True): {32: 3_725, 64: 3_665, 128: 3_623},
    ("a100-40", 12.854e9, 16, True): {64: 1_976, 128: 1_972},
}
NETWORK = {"h100": 50e9, "a100-40": 25e9}  # bytes/s per GPU: 400 Gbit/s each; 1,600 Gbit/s per node


@pytest.mark.parametrize("key", MPT)
def test_published_runs_scale_as_predicted_with_overlapped_communication(key: tuple[str, float, int, bool]) -> None:
    """FSDP overlaps its collectives, so a step takes the longer of computing and sending: at most 5 % off."""
    measured = MPT[key]
    smallest = min(measured)
    for gpus, tokens in measured.items():
        predicted = predicted_mpt_rate(key, gpus, smallest, overlapped=True)
        ratio = predicted / predicted_mpt_rate(key, smallest, smallest, overlapped=True)
        assert ratio == pytest.approx(tokens / measured[smallest], abs=0.05)


def test_the_stated_mfu_agrees_with_published_runs() -> None:
    """The default for an H100 is 40 %; MPT-1B reached 42 and 13B 40 %, without activation checkpointing."""
    for (name, parameters, _, activation_checkpointing), measured in MPT.items():
        if name == "h100" and not activation_checkpointing:
            mfu = 6 * parameters * max(measured.values()) / DEVICES[name].flops
            assert mfu == pytest.approx(0.40, abs=0.06)


def predicted_mpt_rate(key: tuple[str, float, int, bool], gpus: int, smallest: int, overlapped: bool) -> float:
    """Return the predicted tokens/s per GPU, with the compute rate that the smallest run reached."""
    name, parameters, sequences, _ = key
    tokens = sequences * 2048
    compute = tokens / MPT[key][smallest]
    payload = parameters * 2 * (2 + 1)  # weights gathered for both passes, gradients scattered
    network = payload * (gpus - 1) / gpus / min(DEVICES[name].link, 8 * NETWORK[name] if gpus > 8 else math.inf)
    stragglers = straggler_factor(0.02, gpus) / straggler_factor(0.02, smallest)
    seconds = max(compute, network) if overlapped else compute + network
    return tokens / (seconds * stragglers)


def test_scaling_is_not_worthwhile_beyond_the_global_batch_size() -> None:
    """With a global batch of 128 on more than 128 GPUs, a step takes as long as one sample."""

    def run_at(workers: int) -> tuple[TrainingRun, dict[str, float]]:
        compute, network = max(1.0, 128 / workers), 0.05
        terms = {"compute": compute, "packs": 0.0, "decoding": 0.0, "network": network, "update": 0.01}
        run = TrainingRun(
            nodes=workers // 8,
            workers=workers,
            step_time_s=compute + network + 0.01,
            steps=2000,
            checkpoint_stall_s=0.1,
            upload_s=1.0,
            checkpoint_interval_s=600.0,
        )
        return run, terms

    runs = scale_run([8, 16, 32, 64, 128, 256, 512], run_at, FailureModel(failures_per_node_day=0.004))
    assert worthwhile_size(runs) == 128
    assert runs[0].efficiency == 1.0
    assert [run.efficiency for run in runs] == sorted((run.efficiency for run in runs), reverse=True)
    assert "compute" not in {run.bottleneck for run in runs}


def test_daly_and_young_agree_for_short_checkpoints() -> None:
    assert daly_interval(1.0, 1e6) == pytest.approx(young_interval(1.0, 1e6), rel=0.01)
    assert daly_interval(100.0, 10.0) == 10.0
    assert math.isinf(mean_time_between_failures(RUN, NO_FAILURES))
    assert best_interval(RUN, NO_FAILURES) == 20_000
