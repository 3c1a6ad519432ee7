"""Model FLOPs count what the model needs: by hand for Gemma-2B and CLIP-L/336, and by which part trains."""

import pytest

from raylava.train.flops import ModelSize, peak_flops, step_flops

GEMMA_2B = ModelSize(
    body=1_981_884_416,
    head=256_000 * 2048,
    layers=18,
    attention_width=2048,
    vision=303_507_456,
    vision_layers=24,
    vision_width=1024,
    patches=576,
    connector=1024 * 2048 + 2048 + 2048 * 2048 + 2048,
)


def test_a_finetuning_step_costs_six_flops_a_weight_and_token() -> None:
    flops = step_flops(GEMMA_2B, [700] * 10, images=10, supervised=1000, language=True, vision=False)
    body = 6 * 1_981_884_416 * 7000
    assert flops > body
    assert flops == pytest.approx(body, rel=0.15)


def test_what_does_not_train_costs_less() -> None:
    def flops(language: bool, vision: bool) -> float:
        return step_flops(GEMMA_2B, [700] * 10, 10, 1000, language, vision)

    assert flops(False, False) < flops(True, False) < flops(True, True)


def test_long_samples_cost_more_attention_than_as_many_tokens_in_short_ones() -> None:
    long = step_flops(GEMMA_2B, [4096], 0, 100, True, False)
    short = step_flops(GEMMA_2B, [512] * 8, 0, 100, True, False)
    assert long - short == 6 * 18 * 2048 * (4096**2 - 8 * 512**2)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("Tesla T4", 65e12), ("cpu", None)]
)
def test_peaks_are_known_by_the_devices_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
