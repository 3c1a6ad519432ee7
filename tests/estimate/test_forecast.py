"""What a recipe comes to on a cluster: the paper's recipes, without hub, weights or network."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raylava.artifacts import Artifact
from raylava.cli.entry import main
from raylava.config.load import load_recipe
from raylava.config.recipe import Recipe
from raylava.corpus.blocks import Blocks
from raylava.errors import UserError
from raylava.estimate.forecast import Forecast, KnownCorpora, Target, forecast, on_gpus
from raylava.estimate.scaling import simulate_scaling
from raylava.estimate.simulate import FailureModel
from raylava.estimate.sweep_cost import shared_stages
from raylava.estimate.workload import assumed, prepared
from raylava.models.registry import KNOWN_LANGUAGE, KNOWN_VISION
from raylava.models.shapes import LANGUAGE, VISION, shape_of_model
from raylava.perf.hardware import DEVICES, cluster
from raylava.perf.step_time import nominal_speed
from raylava.storage import storage_path
from raylava.toy.demo import recipes_folder
from raylava.tune.sweep import load_sweep
from raylava.tune.variants import variants

NOTHING = KnownCorpora({}, {})


def recipe(name: str = "llava-gemma-2b", *overrides: str) -> Recipe:
    return load_recipe(str(recipes_folder() / f"{name}.yaml"), list(overrides))


def eight(gpu: str = "h100", price: float | None = None) -> Target:
    prices = {} if price is None else {f"{gpu}x8": price}
    return on_gpus(cluster(1, 8, gpu, prices), nominal_speed(DEVICES[gpu]))


def on_eight(name: str = "llava-gemma-2b", *overrides: str, gpu: str = "h100") -> Forecast:
    return forecast(recipe(name, *overrides), eight(gpu), NOTHING)


def test_every_backbone_that_recipes_may_name_without_the_hub_has_its_dimensions_here() -> None:
    assert set(LANGUAGE) == set(KNOWN_LANGUAGE)
    assert set(VISION) == set(KNOWN_VISION)


def test_the_papers_connector_has_the_parameters_that_the_paper_tells() -> None:
    """6.30 M for 2B with CLIP (shared/recipe.md)."""
    assert shape_of_model(recipe().model).connector == 6_295_552


def test_llavas_corpora_give_the_papers_steps() -> None:
    assert [stage.steps for stage in on_eight().stages] == [2_181, 5_198]


@pytest.mark.parametrize("path", sorted(recipes_folder().glob("llava-gemma-*.yaml")), ids=lambda path: path.stem)
def test_the_papers_recipes_fit_eight_h100_within_a_day(path: Path) -> None:
    found = on_eight(path.stem)
    assert found.fits
    assert 0.3 < found.hours < 12
    for stage in found.stages:
        assert stage.best is not None
        assert stage.best.seconds.total <= stage.asked.seconds.total + 1e-9 or stage.asked.warning


def test_gemma_7b_takes_three_to_five_times_as_long_as_2b() -> None:
    """Their bodies are 3.9 times as large, the tower is the same; 8 Gaudi 2 took 4 h and 16 h (shared/recipe.md)."""
    small, large = on_eight(), on_eight("llava-gemma-7b", "finetune.activation_checkpointing=false")
    assert 3 < large.hours / small.hours < 5


def test_skipping_pretraining_spares_its_stages() -> None:
    with_it, without = on_eight(), on_eight("llava-gemma-2b-no-pretrain")
    assert [stage.stage for stage in without.stages] == ["finetune"]
    assert without.stages[0].seconds == with_it.stages[1].seconds
    assert set(without.corpora) == {"instruction"}


def test_a_way_that_does_not_fit_says_what_it_lacks() -> None:
    found = on_eight("llava-gemma-7b", "finetune.zero.stage=0", "finetune.activation_checkpointing=false")
    assert not found.fits
    (stage,) = [one for one in found.stages if one.stage == "finetune"]
    assert "GB in the" in stage.asked.infeasible
    assert stage.best is not None
    assert not stage.best.infeasible
    assert all(one.infeasible for one in stage.options if one.memory.peak > found.target.room.device)


def test_the_largest_pack_fits_and_the_next_larger_one_does_not() -> None:
    (_, stage) = on_eight("llava-gemma-7b").stages
    like = {
        one.way.max_tokens_per_pack: one.infeasible for one in stage.options if one.way.mode == stage.asked.way.mode
    }
    assert stage.largest_pack is not None
    assert not like[stage.largest_pack]
    larger = [infeasible for tokens, infeasible in like.items() if tokens > stage.largest_pack]
    assert larger
    assert all(larger)


def test_settings_left_open_are_the_best_there_is() -> None:
    settings = (
        "finetune.zero.stage=auto",
        "finetune.max_tokens_per_pack=auto",
        "finetune.activation_checkpointing=auto",
    )
    stage = on_eight("llava-gemma-7b", *settings).stages[-1]
    assert stage.best is not None
    assert stage.asked.seconds.total == pytest.approx(stage.best.seconds.total, rel=0.01)


def test_twice_the_nodes_take_more_than_half_the_time_and_cost_no_less() -> None:
    one, two = (
        forecast(
            recipe(), on_gpus(cluster(nodes, 8, "h100", {"h100x8": 60.0}), nominal_speed(DEVICES["h100"])), NOTHING
        )
        for nodes in (1, 2)
    )
    assert one.cost is not None
    assert two.cost is not None
    assert one.hours / 2 < two.hours < one.hours
    assert one.cost == pytest.approx(60 * one.hours)
    assert two.cost >= one.cost


def test_lengths_that_are_assumed_are_llavas_and_within_the_recipes_longest() -> None:
    instruction = recipe().corpora.instruction
    found = assumed("instruction", instruction, 576, 336, rows=None)
    lengths = found.lengths
    assert found.rows == 665_298
    assert lengths.length.max() <= instruction.max_length
    assert lengths.images.mean() == pytest.approx(624_610 / 665_298, abs=0.005)
    assert np.all(lengths.loss_tokens < lengths.length)
    assert "assumed: 665,298 rows" in found.source


def test_a_corpus_that_nobody_knows_wants_its_rows() -> None:
    changed = recipe("llava-gemma-2b", "corpora.alignment.sources.0.annotations=mine.json")
    with pytest.raises(UserError, match=r"corpora\.alignment: mine\.json is not prepared.*give --rows alignment=N"):
        forecast(changed, eight(), NOTHING)
    told = forecast(changed, eight(), KnownCorpora({}, {"alignment": 256_000}))
    assert told.stages[0].steps == 1_000


def test_a_billion_rows_are_estimated_as_readily_as_a_thousand() -> None:
    told = forecast(recipe("llava-gemma-2b-no-pretrain"), eight(), KnownCorpora({}, {"instruction": 1_000_000_000}))
    assert told.stages[0].steps == 7_812_500
    assert told.prepare["instruction"].stored > 1e13


def test_a_prepared_corpus_is_taken_as_it_is(prepared_blocks: Blocks, toy_assets: Artifact) -> None:
    found = prepared(storage_path(prepared_blocks.folder))
    assert np.array_equal(found.lengths.length, prepared_blocks.lengths.length)
    assert found.rows == len(found.lengths)
    assert found.bytes == sum(block.bytes for block in prepared_blocks.manifest.blocks)
    with pytest.raises(UserError, match="no prepared corpus there"):
        prepared(toy_assets.path)


def test_packs_that_the_longest_sample_does_not_fit_are_told(prepared_blocks: Blocks) -> None:
    given = KnownCorpora({"instruction": prepared(storage_path(prepared_blocks.folder))}, {})
    short = recipe("llava-gemma-2b-no-pretrain", "finetune.max_tokens_per_pack=16", "corpora.instruction.max_length=16")
    with pytest.raises(UserError, match=r"finetune\.max_tokens_per_pack=16 is less than the corpus's longest sample"):
        forecast(short, eight(), given)


def test_a_sweep_counts_what_its_variants_share_once() -> None:
    """2 language models × 2 towers × 3 seeds; half of the variants skip pretraining; one tokenizer for both models."""
    found = [one.recipe for one in variants(load_sweep(str(recipes_folder() / "ablations.yaml")), [])]
    counted = shared_stages(found, lambda *_: eight(), lambda _: NOTHING)
    kinds = {kind: [one for one in counted if one.stage == kind] for kind in {one.stage for one in counted}}
    assert {kind: len(own) for kind, own in kinds.items()} == {
        "prepare alignment": 2,
        "prepare instruction": 2,
        "pretrain": 12,
        "finetune": 24,
    }
    assert sum(one.users for one in kinds["prepare instruction"]) == 24
    assert {one.users for one in kinds["pretrain"]} == {1}


def test_scaling_a_recipe_stops_paying_at_its_global_batch() -> None:
    found = simulate_scaling(
        recipe(), cluster(1, 8, "h100"), nominal_speed(DEVICES["h100"]), NOTHING, FailureModel(), nodes=(1, 8, 64)
    )
    assert found.worthwhile_size in (8, 64)
    assert found.scaled[-1].efficiency < found.scaled[0].efficiency
    assert 0.9 < found.goodput <= 1


def told(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["estimate", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    return found


RECIPE = str(recipes_folder() / "llava-gemma-2b.yaml")


def test_the_command_compares_the_nodes_of_a_price_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("h100x8: 60.0\nl4x8: 8.0\n")
    found = told(capfd, RECIPE, "--prices", str(prices), "--storage", str(tmp_path))
    by_place = {one["on"]: one for one in found["estimates"]}
    assert set(by_place) == {"1 × 8 H100", "1 × 8 L4"}
    fitting = {place: one["cost"] for place, one in by_place.items() if one["fits"]}
    assert found["fastest_feasible"] == min(fitting, key=lambda place: fitting[place])
    assert by_place["1 × 8 H100"]["stages"]["finetune"]["trained"] > 2.5e9


def test_the_command_plays_a_run_at_scale(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = told(capfd, RECIPE, "--gpu", "a100", "--simulate", "--spot", "0.05", "--storage", str(tmp_path))
    sizes = [one["workers"] for one in found["simulated"]["scaled"]]
    assert (sizes[0], sizes[-1]) == (8, 4096)
    assert found["simulated"]["world"]["reclaims_per_node_hour"] == 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h1000"], "--gpu h1000: not known"),
        (["--rows", "captions=3"], "--rows captions=…: a recipe's corpora are alignment and instruction"),
        (["--rows", "alignment=many"], "--rows alignment=many: give a number above 0"),
        (["--corpus", "/nowhere"], "no prepared corpus there"),
        (["--spot", "0.1"], "add --simulate"),
        (["--simulate", "--spot", "-1"], "-1 is not between 0 and 1,000"),
        (["--calibrate", "--gpu", "h100"], "--calibrate goes without --gpu"),
        (["--calibrate"], "the recipe trains on GPUs and this machine has none"),
        (["--mfu", "3"], "3 is not above 0 and at most 1"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", RECIPE, *arguments, "--storage", str(tmp_path)]) == 2
    assert message in " ".join(capfd.readouterr().err.split())
