"""The search selects the fastest execution config that fits, and gives a reason against every config that does not."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylava.config.recipe import Language, Model, Training, Vision, ZeroConfig
from raylava.errors import UserError
from raylava.models.shapes import model_shape
from raylava.perf.hardware import DEVICES
from raylava.perf.memory import PackShape, TrainableModel
from raylava.perf.search import (
    Candidate,
    DeviceBudget,
    all_execution_configs,
    fastest_feasible,
    rank_candidates,
    recipe_candidates,
    select,
    usable_memory,
)
from raylava.perf.step_time import StepWorkload, nominal_speed

GEMMA_2B = Model(language=Language(name="google/gemma-2b-it"), vision=Vision(name="openai/clip-vit-large-patch14-336"))
GEMMA_7B = GEMMA_2B.model_copy(update={"language": Language(name="google/gemma-7b-it")})
AUTO = Training(zero=ZeroConfig(stage="auto"), max_tokens_per_pack="auto", activation_checkpointing="auto")
H100 = DEVICES["h100"]


def trainable_model(model: Model = GEMMA_2B, stage: str = "finetune") -> TrainableModel:
    return TrainableModel.of(model_shape(model), stage, Training())


def workload(max_tokens_per_pack: int) -> StepWorkload:
    """Return the workload of a step with 12,000 tokens per rank."""
    packs = math.ceil(12_000 / max_tokens_per_pack)
    return StepWorkload(
        PackShape(max_tokens_per_pack, max_tokens_per_pack // 5, max_tokens_per_pack // 700 + 1),
        packs,
        packs,
        2e14,
        5e13,
        16,
    )


def candidates_within(
    gigabytes: float, training: Training = AUTO, model: TrainableModel | None = None
) -> list[Candidate]:
    """Return the candidates for eight H100 with this much usable memory."""
    budget = DeviceBudget(gigabytes * 1e9, None, 8, 450e9)
    configs = recipe_candidates(training, 2048)
    return rank_candidates(configs, model or trainable_model(), workload, nominal_speed(H100), budget)


def test_activations_are_not_recomputed_if_memory_suffices() -> None:
    fastest = fastest_feasible(candidates_within(75))
    assert fastest is not None
    assert not fastest.config.activation_checkpointing


def test_less_memory_leads_to_more_sharding_or_recomputation() -> None:
    ample, tight = fastest_feasible(candidates_within(75)), fastest_feasible(candidates_within(16))
    assert ample
    assert tight
    assert tight.memory.peak <= 16e9
    assert tight.seconds.total > ample.seconds.total
    assert tight.config.zero_stage == 3 or tight.config.activation_checkpointing


def test_every_infeasible_candidate_has_a_reason() -> None:
    candidates = candidates_within(4)
    assert fastest_feasible(candidates) is None
    assert all("usable" in candidate.infeasible for candidate in candidates)


@given(st.floats(1, 200))
def test_fastest_feasible_is_the_fastest_that_fits(gigabytes: float) -> None:
    candidates = candidates_within(gigabytes)
    fastest = fastest_feasible(candidates)
    feasible = [
        candidate for candidate in candidates if candidate.memory.peak <= gigabytes * 1e9 and not candidate.warning
    ]
    assert (fastest is None) == (not feasible)
    if fastest is not None:
        assert fastest in feasible
        assert fastest.seconds.total <= min(candidate.seconds.total for candidate in feasible) + 1e-6


def test_configs_that_sum_pack_gradients_in_bf16_have_a_warning() -> None:
    """DeepSpeed's stages 0 and 1 accumulate gradients in the weights' precision."""
    for candidate in candidates_within(200):
        config = candidate.config
        assert bool(candidate.warning) == (config.zero_stage < 2 and workload(config.max_tokens_per_pack).packs > 1)
    fp32_model = TrainableModel(trainable_model().shape, True, False, bytes_per_value=4)
    fp32_candidates = candidates_within(200, AUTO.model_copy(update={"precision": "fp32"}), fp32_model)
    assert not any(candidate.warning for candidate in fp32_candidates)


def test_explicit_settings_leave_one_candidate() -> None:
    training = Training(
        zero=ZeroConfig(stage=3, offload_optimizer=True), max_tokens_per_pack=4096, activation_checkpointing=True
    )
    (config,) = recipe_candidates(training, 2048)
    assert (
        config.zero_stage,
        config.offload_optimizer,
        config.activation_checkpointing,
        config.max_tokens_per_pack,
    ) == (3, True, True, 4096)


def test_automatic_packs_hold_the_longest_sample() -> None:
    assert min(config.max_tokens_per_pack for config in recipe_candidates(AUTO, 5000)) == 8192
    assert next(recipe_candidates(AUTO, 40_000)).max_tokens_per_pack == 40_000


def test_fastest_that_fits_is_selected_if_all_that_fit_have_a_warning() -> None:
    """A run that started with stage 1 in bf16 resumes with it, on fewer workers too."""
    candidates = candidates_within(200, Training(zero=ZeroConfig(stage=1), activation_checkpointing="auto"))
    assert fastest_feasible(candidates) is None
    assert not select(candidates).config.activation_checkpointing
    assert not select(candidates).infeasible


def test_smallest_peak_is_selected_if_nothing_fits() -> None:
    candidates = candidates_within(4)
    assert select(candidates).memory.peak == min(candidate.memory.peak for candidate in candidates)
    with pytest.raises(UserError, match="no ZeRO stage supports these offload settings"):
        select([])


def test_compile_excludes_zero_3() -> None:
    training = AUTO.model_copy(update={"compile": True})
    for configs in (recipe_candidates(training, 2048), all_execution_configs(training, 2048)):
        assert 3 not in {config.zero_stage for config in configs}


def test_optimizer_offload_is_infeasible_without_host_memory() -> None:
    training = Training(zero=ZeroConfig(stage=2, offload_optimizer=True))
    budget = DeviceBudget(75e9, 1e9, 8, 450e9)
    (candidate,) = rank_candidates(
        recipe_candidates(training, 2048), trainable_model(), workload, nominal_speed(H100), budget
    )
    assert "on the host" in candidate.infeasible


def test_optimizer_offload_makes_the_update_slower() -> None:
    (on_device,), (on_host,) = (
        candidates_within(200, Training(zero=ZeroConfig(stage=2, offload_optimizer=offload)))
        for offload in (False, True)
    )
    assert on_host.seconds.update > on_device.seconds.update


def test_gemma_7b_finetunes_on_eight_h100_but_not_on_one() -> None:
    """Weights, gradients and Adam's states take 16 bytes for each of 8.5 billion parameters."""

    def candidates(budget: DeviceBudget) -> list[Candidate]:
        configs = recipe_candidates(AUTO, 2048)
        return rank_candidates(configs, trainable_model(GEMMA_7B), workload, nominal_speed(H100), budget)

    assert fastest_feasible(candidates(DeviceBudget(usable_memory(H100.memory), None, 1, 1))) is None
    assert fastest_feasible(candidates(DeviceBudget(usable_memory(H100.memory), None, 8, 450e9)))
