"""Synthetic packs of given sample lengths, for benchmarks and memory measurements without a corpus."""

from collections.abc import Sequence

import numpy as np
import torch

from raylava.models.packs import PackTensors
from raylava.perf.shapes import LlavaShape

SampleSize = tuple[int, int, int]  # tokens, images and loss tokens of one sample


def synthetic_pack(samples: Sequence[SampleSize], shape: LlavaShape, image_token: int) -> PackTensors:
    """Return one pack of samples of the given sizes, with random token ids and random pixels.

    The last tokens of each sample are its loss tokens. As in training, a pack without images gets an additional blank
    sample with one image.
    """
    patches = shape.vision.patches
    side = int(patches**0.5) * shape.vision.patch
    if not any(images for _, images, _ in samples):
        samples = [*samples, (1 + patches, 1, 0)]
    starts = np.cumsum([0, *(length for length, _, _ in samples)])
    ids = torch.cat([_token_ids(length, images * patches, shape, image_token) for length, images, _ in samples])
    target_positions = torch.cat(
        [
            torch.arange(stop - loss_tokens, stop) - 1
            for stop, (_, _, loss_tokens) in zip(starts[1:], samples, strict=True)
        ]
    )
    cu_seqlens = torch.from_numpy(starts.astype(np.int32))
    return PackTensors(
        input_ids=ids[None],
        position_ids=torch.cat([torch.arange(length) for length, _, _ in samples])[None],
        pixel_values=torch.rand(sum(images for _, images, _ in samples), 3, side, side),
        image_positions=(ids == image_token).nonzero()[:, 0],
        target_positions=target_positions,
        labels=ids[target_positions + 1],
        loss_weights=torch.full((len(target_positions),), 1e-3),
        cu_seqlens=cu_seqlens,
        device_cu_seqlens=cu_seqlens,
    )


def _token_ids(length: int, image_tokens: int, shape: LlavaShape, image_token: int) -> torch.Tensor:
    ids = torch.randint(0, min(shape.language.vocabulary - 1, image_token), (length,))
    ids[1 : 1 + image_tokens] = image_token
    return ids
