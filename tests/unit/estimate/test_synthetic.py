"""Synthetic packs are valid inputs of the model."""

import torch

from raylava.config.recipe import Model
from raylava.estimate.synthetic import synthetic_pack
from raylava.models.llava import PackLoss, build_llava
from raylava.models.registry import resolve_model


def test_a_synthetic_pack_has_the_requested_sizes_and_a_finite_loss(toy_model: Model) -> None:
    model = resolve_model(toy_model)
    llava = build_llava(model, 0, torch.float32, "varlen")
    shape, token = model.shape(llava.config.text_config.vocab_size), llava.config.image_token_index
    patches = shape.vision.patches
    pack = synthetic_pack([(patches + 10, 1, 5), (7, 0, 3)], shape, token)
    assert pack.input_ids.shape == (1, patches + 17)
    assert len(pack.labels) == 8
    assert torch.equal(pack.input_ids[0, pack.target_positions + 1], pack.labels)
    assert torch.isfinite(PackLoss(llava)(**vars(pack)))
    text_only = synthetic_pack([(7, 0, 3)], shape, token)
    assert text_only.pixel_values.shape[0] == 1
    assert (text_only.input_ids == token).sum() == patches
