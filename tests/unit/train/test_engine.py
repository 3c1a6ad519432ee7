"""The learning rate schedule, the optimizer's parameter groups and DeepSpeed's config follow the recipe."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from raylava.config.recipe import Training
from raylava.models.llava import PackLoss, build_llava, set_trainable
from raylava.models.registry import ResolvedModel
from raylava.train.engine import deepspeed_config, lr_multiplier, parameter_groups

COSINE = Training(lr=1.0, warmup_ratio=0.1, lr_schedule="cosine")


def test_learning_rate_warms_up_linearly_and_decays_as_a_cosine_to_zero() -> None:
    multipliers = [lr_multiplier(step, 100, COSINE) for step in range(100)]
    assert multipliers[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert multipliers[10] == 1.0
    assert multipliers[55] == pytest.approx(0.5)
    assert multipliers[10:] == sorted(multipliers[10:], reverse=True)
    assert 0 < multipliers[99] < 1e-3


def test_warmup_from_zero_has_the_rates_of_transformers() -> None:
    """The paper's mode: step k of w warm-up steps has k/w of the peak rate, so that the first step has none."""
    training = COSINE.model_copy(update={"warmup_start": "zero"})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 10, 100)
    for step in range(100):
        assert lr_multiplier(step, 100, training) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("lr_schedule", "middle", "end"), [("linear", 0.5, 1 / 90), ("constant", 1.0, 1.0)])
def test_linear_and_constant_schedules_after_warmup(lr_schedule: str, middle: float, end: float) -> None:
    training = COSINE.model_copy(update={"lr_schedule": lr_schedule})
    assert lr_multiplier(55, 100, training) == pytest.approx(middle)
    assert lr_multiplier(99, 100, training) == pytest.approx(end)


def test_first_step_without_warmup_has_the_full_learning_rate() -> None:
    assert lr_multiplier(0, 10, COSINE.model_copy(update={"warmup_ratio": 0.0})) == 1.0


def test_connector_and_vision_tower_can_have_their_own_learning_rates(resolved_model: ResolvedModel) -> None:
    model = PackLoss(build_llava(resolved_model, seed=0, dtype=torch.float32))
    training = Training(lr=2e-5, connector_lr=1e-4, vision_lr=2e-6, weight_decay=0.1)
    set_trainable(model.llava, "finetune", vision=True)
    groups = list(parameter_groups(model, training))
    assert {group["peak_lr"] for group in groups} == {2e-5, 1e-4, 2e-6}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert {weight.ndim >= 2 for weight in group["params"]} == {group["weight_decay"] > 0}


def test_additional_deepspeed_settings_are_passed_on_without_overriding_those_of_the_recipe() -> None:
    training = Training(deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True})
    config = deepspeed_config(training, trained=10**6)
    assert config["wall_clock_breakdown"] is True
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(("trained", "bucket"), [(100, 100), (10**10, 500_000_000)])
def test_reduce_bucket_is_no_larger_than_the_trainable_parameters(trained: int, bucket: int) -> None:
    assert deepspeed_config(Training(), trained)["zero_optimization"]["reduce_bucket_size"] == bucket
