"""A LLaVA with toy backbones and no training, as a Hugging Face folder, for tests of generation."""

from pathlib import Path

import pytest

from raylava.config.recipe import Model
from raylava.models.export import export_untrained
from raylava.models.registry import resolve_model


@pytest.fixture(scope="session")
def untrained_llava(toy_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model; the conftest.py of a test package imports this fixture."""
    folder = tmp_path_factory.mktemp("models") / "gemma"
    export_untrained(resolve_model(toy_model), 0, "pad", "bf16", str(folder))
    return folder
