"""Packs of noise in given lengths: what is timed and weighed where no corpus is at hand."""

from collections.abc import Sequence

import numpy as np
import torch

from raylava.models.llava import PackTensors
from raylava.perf.shapes import LlavaShape

Sizes = tuple[int, int, int]  # of a sample: tokens, images, supervised tokens


def synthetic_pack(samples: Sequence[Sizes], shape: LlavaShape, image_token: int) -> PackTensors:
    """Samples of such sizes in one row: random ids, random pixels, each sample's last tokens supervised.

    A pack without a image gets a blank sample that has one, as in training.
    """
    patches = shape.vision.patches
    side = int(patches**0.5) * shape.vision.patch
    if not any(images for _, images, _ in samples):
        samples = [*samples, (1 + patches, 1, 0)]
    starts = np.cumsum([0, *(length for length, _, _ in samples)])
    ids = torch.cat([_row(length, images * patches, shape, image_token) for length, images, _ in samples])
    kept = torch.cat(
        [
            torch.arange(stop - loss_tokens, stop) - 1
            for stop, (_, _, loss_tokens) in zip(starts[1:], samples, strict=True)
        ]
    )
    return PackTensors(
        input_ids=ids[None],
        position_ids=torch.cat([torch.arange(length) for length, _, _ in samples])[None],
        pixel_values=torch.rand(sum(images for _, images, _ in samples), 3, side, side),
        target_positions=kept,
        labels=ids[kept + 1],
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
    )


def _row(length: int, image_tokens: int, shape: LlavaShape, image_token: int) -> torch.Tensor:
    row = torch.randint(0, min(shape.language.vocabulary - 1, image_token), (length,))
    row[1 : 1 + image_tokens] = image_token
    return row
