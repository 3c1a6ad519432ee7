"""A step that went wrong, kept so that anyone can look at it: `dump` at the end of the run, `replay` on any machine.

Knows nothing of Ray or DeepSpeed beyond the engine it is given.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from raylava.corpus.blocks import Blocks
from raylava.errors import UserError
from raylava.model.backbones import resolve_language, resolve_vision
from raylava.model.llava import PackLoss, assemble, choose_trainable
from raylava.recipe import Model, Training
from raylava.storage import Place, place
from raylava.train.job import TrainJob, layout_of
from raylava.train.plan import Step

if TYPE_CHECKING:
    from raylava.train.engine import Engine

_ABOUT = "replay.json"
_WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Replayed:
    """One sample of the step, alone: its number and id, its loss a supervised token, its gradient's norm."""

    number: int
    sample_id: str
    loss: float
    gradient_norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def dump(job: TrainJob, engine: "Engine", step: Step, sample_ids: list[str]) -> str:
    """Write the trained weights as they are and what formed the step beside the run; returns where. For all ranks."""
    from safetensors.torch import save_file

    target = place(job.output) / f"replay-step-{step.number}"
    weights = engine.weights(only_trained=True)
    if weights is None:
        return target.uri
    settings = {
        field.name: getattr(job, field.name)
        for field in dataclasses.fields(job)
        if field.name not in ("model", "training", "vision", "language", "tracking")
    }
    about = settings | {
        "model": job.model.model_dump(mode="json"),
        "training": job.training.model_dump(mode="json"),
        "step": step.number,
        "samples": [int(number) for number in step.samples],
        "sample_ids": sample_ids,
    }
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: value.contiguous() for name, value in weights.items()}, Path(folder) / _WEIGHTS)
        (Path(folder) / _ABOUT).write_text(json.dumps(about, indent=2))
        target.upload_folder(Path(folder))
    return target.uri


def replay(folder: Place) -> Iterator[Replayed]:
    """Each sample of a dumped step, computed alone in fp32. Raises UserError where there is no dump."""
    from safetensors.torch import load_file

    if not (folder / _ABOUT).exists():
        raise UserError(f"{folder}: no dumped step there (no {_ABOUT}); a run that stopped tells its folder")
    about = json.loads((folder / _ABOUT).read_bytes())
    job = _job(about)
    llava = assemble(job.model, job.vision, job.seed, torch.float32)
    llava.load_state_dict(load_file((folder / _WEIGHTS).local_copy()), strict=False)
    choose_trainable(llava, job.stage, vision=job.training.vision_lr is not None)
    loss, blocks, layout = PackLoss(llava), Blocks.at(place(job.blocks)), layout_of(job)
    for number in about["samples"]:
        sample = blocks[number]
        llava.zero_grad()
        pack = layout.tensors([sample])
        value = loss(**vars(pack)) / len(pack.labels)
        value.backward()
        gradients = [weight.grad.norm() for weight in llava.parameters() if weight.grad is not None]
        yield Replayed(number, sample.sample_id, value.item(), torch.stack(gradients).norm().item())


def _job(about: dict) -> TrainJob:  # type: ignore[type-arg]
    model = Model.model_validate(about["model"])
    given = {name: about[name] for name in ("stage", "seed", "blocks", "connector", "fit", "output")}
    return TrainJob(
        model=model,
        vision=resolve_vision(model.vision),
        language=resolve_language(model.language),
        training=Training.model_validate(about["training"]),
        **given,
    )
