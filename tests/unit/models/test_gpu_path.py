"""The forward pass on a GPU that this machine does not have: it reads no value back, and attention calls the kernel."""

from typing import Any

import pytest
import torch

from raylava.corpus.blocks import Blocks
from raylava.models.llava import PackLoss, build_llava
from raylava.models.registry import ResolvedModel
from raylava.train.data_loader import PackCollator
from tests.support.fake_gpu import CUDA, fake_gpu


def test_forward_pass_of_a_pack_reads_nothing_from_the_gpu(
    resolved_model: ResolvedModel,
    prepared_blocks: Blocks,
    pack_collator: PackCollator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llava = build_llava(resolved_model, seed=0, dtype=torch.bfloat16, attn_implementation="varlen")
    model = PackLoss(llava)
    host_pack = pack_collator.collate([prepared_blocks[number] for number in range(4)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with fake_gpu():
        on_gpu: dict[str, Any] = {
            name: torch.empty(value.shape, dtype=value.dtype, device=CUDA) for name, value in values.items()
        }
        pack = host_pack.to(CUDA, torch.bfloat16)
        loss = torch.func.functional_call(model, on_gpu, (), vars(pack))
    assert (loss.shape, loss.dtype, loss.device) == ((), torch.float32, CUDA)
    assert (pack.pixel_values.dtype, pack.pixel_values.device) == (torch.bfloat16, CUDA)
    assert pack.cu_seqlens.device.type == "cpu"
