"""Fixtures of these tests."""

from pathlib import Path

import pytest

from raylava.artifacts import Artifact
from tests.support.exported import exported as exported
from tests.support.exported import image_aspect as image_aspect
from tests.support.siglip import siglip as siglip


@pytest.fixture
def clip(toy_assets: Artifact) -> Path:
    """The folder of the toy CLIP."""
    return Path((toy_assets.path / "backbones" / "clip").path)
