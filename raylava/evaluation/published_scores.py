"""Scores published in the paper (Hinck et al. 2024, LLaVA-Gemma, arXiv:2404.01331): a single run per cell.

Scores are on the scale of raylava's headline metrics: fractions, except points for mme (perception), mme-cognition and
mm-vet. None marks scores that we could not confirm in any source.
"""

from typing import Any

from raylava.config.recipe import Recipe

SOURCE = "Hinck et al. 2024, arXiv:2404.01331"

_BENCHMARKS = ("gqa", "mme-cognition", "mme", "mm-vet", "pope", "pope-f1", "vqav2", "mmvp", "scienceqa")
_CLIP, _DINOV2 = "openai/clip-vit-large-patch14-336", "facebook/dinov2-large"
_SCORES: dict[tuple[str, str, bool], tuple[float | None, ...]] = {
    ("google/gemma-2b-it", _CLIP, True): (0.531, 236, 1130, 17.7, 0.850, 0.839, 0.7065, 0.287, 0.564),
    ("google/gemma-2b-it", _CLIP, False): (0.481, 248, 935, 13.1, 0.784, 0.762, 0.6174, 0.180, 0.549),
    ("google/gemma-2b-it", _DINOV2, True): (0.587, 307, 1133, 19.1, 0.853, 0.838, None, None, None),
    ("google/gemma-7b-it", _CLIP, True): (0.472, 254, 895, 18.2, 0.848, 0.829, 0.687, 0.327, 0.625),
    ("google/gemma-7b-it", _CLIP, False): (0.472, 278, 857, 19.1, 0.782, 0.734, 0.6509, 0.240, 0.636),
}


def published_scores(recipe: Recipe) -> dict[str, float]:
    """Return the paper's scores by benchmark for the recipe's backbones and connector pretraining; empty if none."""
    cell = (recipe.model.language.name, recipe.model.vision.name, recipe.pretrain.enabled)
    scores = zip(_BENCHMARKS, _SCORES.get(cell, ()), strict=False)
    return {name: score for name, score in scores if score is not None}


def published_rows(benchmark: str) -> list[dict[str, Any]]:
    """Return all scores of the paper for an official benchmark; one with two scores (mme, pope) has rows for both."""
    return [
        {"language": language, "vision": vision, "pretrained": pretrained, "benchmark": name, "value": score}
        for (language, vision, pretrained), scores in _SCORES.items()
        for name, score in zip(_BENCHMARKS, scores, strict=True)
        if score is not None and (name == benchmark or name.startswith(f"{benchmark}-")) and benchmark
    ]
