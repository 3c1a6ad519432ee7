"""Published backbones can be timed without their weights."""

import pytest
import torch

from raylava.config.recipe import Language, Model, Vision
from raylava.estimate.calibrate import random_llava
from raylava.models.families import vision_families
from raylava.models.shapes import model_shape

PUBLISHED = [name for family in vision_families().values() for name in family.published]


@pytest.mark.parametrize("tower", PUBLISHED)
def test_the_random_model_has_the_parameters_of_the_published_backbones(tower: str) -> None:
    model = Model(language=Language(name="google/gemma-2b-it"), vision=Vision(name=tower))
    with torch.device("meta"):
        llava = random_llava(model, torch.bfloat16, "varlen")
    assert sum(weight.numel() for weight in llava.parameters()) == model_shape(model).parameters
