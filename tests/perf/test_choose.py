"""Of the ways that a recipe leaves open the fastest that fits is taken, and every other has a reason against it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylava.config.recipe import Language, Model, Training, Vision, ZeroConfig
from raylava.errors import UserError
from raylava.models.shapes import shape_of_model
from raylava.perf.hardware import DEVICES, Cluster, cluster, device, device_named, read_prices
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
from raylava.perf.step_time import JobSpec, nominal_speed, step_seconds
from raylava.perf.traffic import Traffic

GEMMA_2B = Model(language=Language(name="google/gemma-2b-it"), vision=Vision(name="openai/clip-vit-large-patch14-336"))
GEMMA_7B = GEMMA_2B.model_copy(update={"language": Language(name="google/gemma-7b-it")})
AUTO = Training(zero=ZeroConfig(stage="auto"), max_tokens_per_pack="auto", activation_checkpointing="auto")
H100 = DEVICES["h100"]


def trained(model: Model = GEMMA_2B, stage: str = "finetune") -> TrainableModel:
    return TrainableModel.of(shape_of_model(model), stage, Training())


def work(max_tokens_per_pack: int) -> JobSpec:
    """Of a step of 12,000 tokens a rank."""
    packs = math.ceil(12_000 / max_tokens_per_pack)
    return JobSpec(
        PackShape(max_tokens_per_pack, max_tokens_per_pack // 5, max_tokens_per_pack // 700 + 1),
        packs,
        packs,
        2e14,
        5e13,
        16,
    )


def options(gigabytes: float, training: Training = AUTO, model: TrainableModel | None = None) -> list[Candidate]:
    room = DeviceBudget(gigabytes * 1e9, None, 8, 450e9)
    return rank_candidates(recipe_candidates(training, 2048), model or trained(), work, nominal_speed(H100), room)


def test_with_room_to_spare_nothing_is_computed_twice() -> None:
    chosen = fastest_feasible(options(75))
    assert chosen is not None
    assert not chosen.way.activation_checkpointing


def test_with_less_room_more_is_sharded_or_computed_twice() -> None:
    roomy, tight = fastest_feasible(options(75)), fastest_feasible(options(16))
    assert roomy
    assert tight
    assert tight.memory.peak <= 16e9
    assert tight.seconds.total > roomy.seconds.total
    assert tight.way.zero_stage == 3 or tight.way.activation_checkpointing


def test_where_nothing_fits_nothing_is_chosen_and_all_say_why() -> None:
    found = options(4)
    assert fastest_feasible(found) is None
    assert all("usable" in one.infeasible for one in found)


@given(st.floats(1, 200))
def test_what_is_chosen_fits_and_is_the_fastest_that_does(gigabytes: float) -> None:
    found = options(gigabytes)
    chosen = fastest_feasible(found)
    fitting = [one for one in found if one.memory.peak <= gigabytes * 1e9 and not one.warning]
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert chosen in fitting
        assert chosen.seconds.total <= min(one.seconds.total for one in fitting) + 1e-6


def test_packs_whose_gradients_would_be_summed_in_bf16_are_not_chosen() -> None:
    """DeepSpeed's stages 0 and 1 sum in the weights' own precision."""
    for one in options(200):
        assert bool(one.warning) == (one.way.zero_stage < 2 and work(one.way.max_tokens_per_pack).packs > 1)
    exact = options(
        200, AUTO.model_copy(update={"precision": "fp32"}), TrainableModel(trained().shape, True, False, value=4)
    )
    assert not any(one.warning for one in exact)


def test_what_the_recipe_says_is_not_left_open() -> None:
    said = Training(
        zero=ZeroConfig(stage=3, offload_optimizer=True), max_tokens_per_pack=4096, activation_checkpointing=True
    )
    (way,) = recipe_candidates(said, 2048)
    assert (way.zero_stage, way.offload_optimizer, way.activation_checkpointing, way.max_tokens_per_pack) == (
        3,
        True,
        True,
        4096,
    )


def test_no_way_has_packs_that_its_longest_sample_does_not_fit() -> None:
    assert min(way.max_tokens_per_pack for way in recipe_candidates(AUTO, 5000)) == 8192
    assert next(recipe_candidates(AUTO, 40_000)).max_tokens_per_pack == 40_000


def test_where_all_that_fit_want_caution_the_fastest_of_them_is_taken() -> None:
    """A run that began with stage 1 in bf16 goes on with it, on fewer workers too."""
    found = options(200, Training(zero=ZeroConfig(stage=1), activation_checkpointing="auto"))
    assert fastest_feasible(found) is None
    assert not select(found).way.activation_checkpointing
    assert not select(found).infeasible


def test_where_nothing_fits_what_holds_least_is_tried() -> None:
    found = options(4)
    assert select(found).memory.peak == min(one.memory.peak for one in found)
    with pytest.raises(UserError, match="fits no ZeRO stage that is left"):
        select([])


def test_compiled_code_leaves_stage_3_out() -> None:
    compiled = AUTO.model_copy(update={"compile": True})
    for ways in (recipe_candidates(compiled, 2048), all_execution_configs(compiled, 2048)):
        assert 3 not in {way.zero_stage for way in ways}


def test_a_host_without_memory_takes_no_optimizer() -> None:
    said = Training(zero=ZeroConfig(stage=2, offload_optimizer=True))
    (found,) = rank_candidates(
        recipe_candidates(said, 2048), trained(), work, nominal_speed(H100), DeviceBudget(75e9, 1e9, 8, 450e9)
    )
    assert "on the host" in found.infeasible


def test_offloading_costs_time() -> None:
    (here,), (there,) = (
        options(200, Training(zero=ZeroConfig(stage=2, offload_optimizer=offload))) for offload in (False, True)
    )
    assert there.seconds.update > here.seconds.update


def test_a_slower_network_costs_only_what_goes_over_it() -> None:
    way = next(recipe_candidates(Training(), 2048))
    sent = Traffic(1e9, 1e9, 0, 2)
    fast, slow = (
        step_seconds(nominal_speed(H100), work(2048), sent, trained(), way, 8, rate) for rate in (450e9, 45e9)
    )
    assert slow.compute == fast.compute
    assert slow.network == pytest.approx(10 * fast.network, rel=0.1)


def test_a_7b_does_not_finetune_on_one_h100_but_on_eight() -> None:
    """Weights, gradients and Adam's states of 8.5 G parameters are 16 bytes each."""
    alone = rank_candidates(
        recipe_candidates(AUTO, 2048),
        trained(GEMMA_7B),
        work,
        nominal_speed(H100),
        DeviceBudget(usable_memory(H100.memory), None, 1, 1),
    )
    assert fastest_feasible(alone) is None
    eight = DeviceBudget(usable_memory(H100.memory), None, 8, 450e9)
    assert fastest_feasible(
        rank_candidates(recipe_candidates(AUTO, 2048), trained(GEMMA_7B), work, nominal_speed(H100), eight)
    )


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
    ],
)
def test_devices_are_known_by_what_cuda_calls_them(reported: str, name: str) -> None:
    found = device_named(reported)
    assert found is not None
    assert found.name == name


def test_a_device_that_is_not_listed_is_refused_with_those_that_are() -> None:
    with pytest.raises(UserError, match="--gpu h1000: not known; known: b200, "):
        device("h1000")


def test_nodes_are_joined_by_all_their_network_cards() -> None:
    """NCCL reaches some 370 GB/s over eight cards of 50 GB/s beside an NVLink of 450."""
    one, two, singles = cluster(1, 8, "h100"), cluster(2, 8, "h100"), cluster(2, 1, "h100")
    assert (one.bandwidth, two.bandwidth, singles.bandwidth) == (450e9, 400e9, 50e9)
    assert isinstance(one, Cluster)


def test_prices_are_of_nodes(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("prices") / "prices.yaml"
    file.write_text("h100x8: 60.0\na100-40x8: 20\n")
    prices = read_prices(str(file))
    assert cluster(2, 8, "h100", prices).price == 60.0
    assert cluster(2, 4, "h100", prices).price is None


@pytest.mark.parametrize("line", ["h100: 3", "h100x8: free", "h100x8: -1", "h100x0: 5", "gpuxx: 2"])
def test_a_price_table_that_is_none_is_refused(line: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("prices") / "prices.yaml"
    file.write_text(line)
    with pytest.raises(UserError, match=r"write such as `h100x8: 60\.0`"):
        read_prices(str(file))
