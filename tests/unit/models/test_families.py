"""A family module agrees with transformers."""

import pytest
import transformers
from transformers import AutoConfig

from raylava.models.families import clip, dinov2, gemma, language_families, register, siglip, vision_families
from raylava.models.families.family import LanguageFamily, VisionFamily

FAMILIES = [module.FAMILY for module in (clip, dinov2, siglip, gemma)]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_omitted_fields_have_the_defaults_of_transformers_config(family: VisionFamily | LanguageFamily) -> None:
    config = AutoConfig.for_model(str(family.defaults["model_type"])).to_dict()
    assert {name: config[name] for name in family.defaults} == family.defaults


@pytest.mark.parametrize("family", vision_families().values(), ids=lambda family: family.name)
def test_vision_class_exists_in_transformers(family: VisionFamily) -> None:
    assert getattr(transformers, family.model_class).config_class.model_type in family.model_types


def test_family_with_the_name_or_model_type_of_another_is_refused() -> None:
    with pytest.raises(ValueError, match="has the name or a model type of clip"):
        register(VisionFamily("other", ("clip",), "CLIPVisionModel", {}, clip.FAMILY.shape))
    assert list(vision_families()) == ["clip", "dinov2", "siglip"]
    assert list(language_families()) == ["gemma"]
