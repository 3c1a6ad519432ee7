"""A pack on its way to the model: the same values as on the host, whatever is done where."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from raylava.corpus.images import normalize_pixels
from raylava.models.packs import HostPack, normalize_on_device
from raylava.models.registry import PixelRule
from tests.support.fake_gpu import CUDA, fake_gpu

CLIP = PixelRule(4, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@given(seed=st.integers(0, 999), images=st.integers(1, 3))
def test_pixels_normalized_on_the_device_equal_those_of_the_host_bit_by_bit(seed: int, images: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (images, 4, 4, 3), dtype=np.uint8)
    expected = torch.from_numpy(normalize_pixels(pixels, CLIP))
    assert torch.equal(normalize_on_device(torch.from_numpy(pixels), CLIP), expected)


def host_pack() -> HostPack:
    numbers = torch.arange(3)
    return HostPack(
        input_ids=numbers[None],
        position_ids=numbers[None],
        pixels=torch.zeros(2, 4, 4, 3, dtype=torch.uint8),
        rule=CLIP,
        image_positions=numbers,
        target_positions=numbers,
        labels=numbers,
        loss_weights=torch.ones(3),
        cu_seqlens=torch.tensor([0, 3], dtype=torch.int32),
    )


def test_lengths_of_samples_stay_on_the_host_and_all_else_moves_to_the_gpu() -> None:
    with fake_gpu():
        pack = host_pack().to(CUDA, torch.bfloat16)
    devices = {name: value.device.type for name, value in vars(pack).items()}
    assert devices.pop("cu_seqlens") == "cpu"
    assert set(devices.values()) == {"cuda"}
    assert pack.pixel_values.dtype == torch.bfloat16
    assert pack.device_cu_seqlens.dtype == torch.int32


def test_pack_for_a_cpu_is_complete_before_its_step() -> None:
    cpu = torch.device("cpu")
    pack = host_pack().prepare(cpu, torch.float32)
    assert not isinstance(pack, HostPack)
    assert all(vars(pack.to(cpu, torch.float32))[name] is value for name, value in vars(pack).items())
