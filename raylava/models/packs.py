"""A pack of samples on the host and on the training device: what the collator builds, and what the model receives."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from raylava.models.registry import PixelRule


@dataclass(frozen=True)
class PackTensors:
    """The model inputs of one pack: T tokens of several samples in one row, N images, S loss tokens.

    input_ids (1, T) int64, image tokens expanded; position_ids (1, T) int64, restarting at 0 with each sample;
    pixel_values (N, 3, size, size); image_positions (N · tokens per image,) int64, the positions of image tokens;
    target_positions (S,) int64, the positions whose next token is in the loss; labels (S,) int64; loss_weights (S,)
    float32, the weight of each loss token in the step's loss; cu_seqlens (samples + 1,) int32 on the host, the start of
    each sample and T; device_cu_seqlens, its copy on the device of the other tensors.
    """

    input_ids: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    image_positions: Tensor
    target_positions: Tensor
    labels: Tensor
    loss_weights: Tensor
    cu_seqlens: Tensor
    device_cu_seqlens: Tensor

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.pixel_values)

    def to(self, device: torch.device, dtype: torch.dtype) -> "PackTensors":
        """Copy the tensors to the device, and cast pixels to the model's dtype."""
        stay_or_cast = {
            "cu_seqlens": self.cu_seqlens,
            "pixel_values": self.pixel_values.to(device, dtype, non_blocking=True),
        }
        moved = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if name not in stay_or_cast
        }
        return PackTensors(**moved, **stay_or_cast)


@dataclass(frozen=True)
class HostPack:
    """A pack on the host, whose pixels are those of the blocks: `pixels` (N, size, size, 3) uint8.

    `rule` says how to normalize them; the other fields are those of PackTensors.
    """

    input_ids: Tensor
    position_ids: Tensor
    pixels: Tensor
    rule: PixelRule
    image_positions: Tensor
    target_positions: Tensor
    labels: Tensor
    loss_weights: Tensor
    cu_seqlens: Tensor

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.pixels)

    def pin(self) -> "HostPack":
        """Copy the tensors to page-locked memory, from which `to` copies while the device computes."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        pinned: dict[str, Any] = {name: value.pin_memory() for name, value in tensors.items()}
        return replace(self, **pinned)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> "LoadedPack":
        """Do what can be done for `to` before the step, in the loader's thread: on a CPU all of it."""
        return self.pin() if device.type == "cuda" else self.to(device, dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> PackTensors:
        """Copy the tensors to the device, and normalize the pixels there; nothing is read back."""
        return PackTensors(
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            pixel_values=normalize_on_device(self.pixels.to(device, non_blocking=True), self.rule).to(dtype),
            image_positions=self.image_positions.to(device, non_blocking=True),
            target_positions=self.target_positions.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            loss_weights=self.loss_weights.to(device, non_blocking=True),
            cu_seqlens=self.cu_seqlens,
            device_cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
        )


LoadedPack = HostPack | PackTensors


def normalize_on_device(pixels: Tensor, rule: PixelRule) -> Tensor:
    """Normalize (N, size, size, 3) uint8 to (N, 3, size, size) fp32 by mean and std, as corpus.images does on the host.

    Mean and std are passed to the kernels as numbers, since a tensor of them would have to be copied first.
    """
    values = pixels.movedim(-1, 1).to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
    for channel, (mean, std) in enumerate(zip(rule.mean, rule.std, strict=True)):
        values[:, channel].sub_(mean).div_(std)
    return values
