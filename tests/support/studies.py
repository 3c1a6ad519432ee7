"""Sweeps, searches and studies of the shipped 2B recipe, for tests that train nothing."""

from typing import Any

from raylava.storage import StoragePath
from raylava.toy.demo import recipes_folder
from raylava.tune.study import StudyRegistry, VariantStudy
from raylava.tune.sweep import SearchConfig, SweepConfig
from raylava.tune.variants import Variant

SPACE = {"finetune.lr": {"loguniform": [1e-6, 1e-4]}, "finetune.epochs": {"int": [1, 3]}}


def make_search(**settings: Any) -> SearchConfig:
    return SearchConfig.model_validate({"space": SPACE, "objective": {"loss": "min"}, "trials": 4} | settings)


def make_sweep(**settings: Any) -> SweepConfig:
    return SweepConfig(name="rates", recipe=str(recipes_folder() / "llava-gemma-2b.yaml"), **settings)


def open_registry(folder: StoragePath, **settings: Any) -> StudyRegistry:
    """Return the registry of a search with `settings`; a variant's results depend on its recipe alone."""
    return StudyRegistry(make_search(**settings), "rates", folder, lambda variant: variant.recipe.fingerprint_fields())


def resume_study(variant: Variant, folder: StoragePath, **settings: Any) -> VariantStudy:
    """Open the variant's study as a new driver does, from what is stored in the folder."""
    (study,) = open_registry(folder, **settings).resume_studies([variant])
    return study


def loss_result(loss: float) -> dict[str, Any]:
    """Return what a finished trial reports to Ray Tune."""
    return {"objective/loss": loss}
