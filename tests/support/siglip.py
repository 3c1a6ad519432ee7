"""A SigLIP vision tower with random weights, as a Hugging Face folder."""

import json
from pathlib import Path

import pytest
from transformers import SiglipVisionConfig, SiglipVisionModel


@pytest.fixture(scope="session")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tower; the conftest.py of a test package imports this fixture."""
    folder = tmp_path_factory.mktemp("siglip")
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    SiglipVisionModel(config).save_pretrained(folder)
    preprocessor = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder
