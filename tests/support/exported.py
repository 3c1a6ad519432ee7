"""An untrained model in fp32, exported as a Hugging Face folder, for tests of the export."""

from pathlib import Path

import pytest
import torch

from raylava.models.export import export_model
from raylava.models.llava import build_llava
from raylava.models.registry import ResolvedModel


@pytest.fixture(scope="session", params=["pad", "crop"])
def image_aspect(request: pytest.FixtureRequest) -> str:
    """How images become square."""
    return request.param


@pytest.fixture(scope="session")
def exported(image_aspect: str, resolved_model: ResolvedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model; the conftest.py of a test package imports both fixtures."""
    folder = tmp_path_factory.mktemp("exported")
    export_model(build_llava(resolved_model, seed=0, dtype=torch.float32), None, resolved_model, image_aspect, folder)
    return folder
