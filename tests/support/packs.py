"""Packs of prepared samples, and the loss and gradients of a model over them, computed without an engine."""

import torch

from raylava.corpus.blocks import Blocks
from raylava.models.llava import PackLoss, set_trainable
from raylava.models.packs import HostPack, PackTensors
from raylava.train.data_loader import PackCollator


def collate_groups(blocks: Blocks, collator: PackCollator, groups: list[list[int]]) -> list[PackTensors]:
    """Return one pack for each group of sample numbers, in fp32."""
    return [on_cpu(collator.collate([blocks[number] for number in group])) for group in groups]


def on_cpu(pack: HostPack) -> PackTensors:
    """Return the tensors of a pack for a model in fp32."""
    return pack.to(torch.device("cpu"), torch.float32)


def loss_and_gradients(model: PackLoss, packs: list[PackTensors]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the summed loss of finetuning over the packs, and its gradient by weight name."""
    set_trainable(model.llava, "finetune")
    model.zero_grad()
    total = torch.zeros(())
    for pack in packs:
        loss = model(**vars(pack))
        loss.backward()
        total += loss.detach()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return float(total), gradients
