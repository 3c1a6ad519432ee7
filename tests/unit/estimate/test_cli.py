"""The command `raylava estimate`, its JSON output and its error messages."""

import json
from pathlib import Path
from typing import Any

import pytest

from raylava.cli import main
from raylava.toy.demo import recipes_folder

RECIPE = str(recipes_folder() / "llava-gemma-2b.yaml")


def estimate_json(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["estimate", *arguments, "--json"]) == 0
    data: dict[str, Any] = json.loads(capfd.readouterr().out)
    return data


def test_the_nodes_of_a_price_table_are_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("h100x8: 60.0\nl4x8: 8.0\n")
    data = estimate_json(capfd, RECIPE, "--prices", str(prices), "--storage", str(tmp_path))
    by_target = {estimate["target"]: estimate for estimate in data["estimates"]}
    assert set(by_target) == {"1 × 8 H100", "1 × 8 L4"}
    costs = {target: estimate["cost"] for target, estimate in by_target.items() if estimate["fits"]}
    assert data["best"] == min(costs, key=lambda target: costs[target])
    assert by_target["1 × 8 H100"]["stages"]["finetune"]["trainable_parameters"] > 2.5e9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h1000"], "--gpu h1000: unknown GPU; choose one of: gb200"),
        (["--rows", "captions=3"], "--rows captions=…: a recipe's corpora are alignment and instruction"),
        (["--rows", "alignment=many"], "--rows alignment=many: give a number above 0"),
        (["--corpus", "/nowhere"], "no prepared corpus there"),
        (["--spot", "0.1"], "add --simulate"),
        (["--simulate", "--spot", "-1"], "-1 is not between 0 and 1,000"),
        (["--calibrate", "--gpu", "h100"], "--calibrate cannot be combined with --gpu"),
        (["--calibrate"], "the recipe trains on GPUs and this machine has none"),
        (["--mfu", "3"], "3 is not above 0 and at most 1"),
    ],
)
def test_invalid_arguments_are_rejected_with_one_line(
    arguments: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", RECIPE, *arguments, "--storage", str(tmp_path)]) == 2
    assert message in " ".join(capfd.readouterr().err.split())
