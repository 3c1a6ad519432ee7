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

from raylava.config.recipe import Model, Training
from raylava.corpus.blocks import Blocks
from raylava.errors import UserError
from raylava.models.llava import PackLoss, build_llava, set_trainable
from raylava.models.registry import resolve_language, resolve_vision
from raylava.storage import StoragePath, storage_path
from raylava.train.batch_plan import Step
from raylava.train.spec import TrainSpec, pack_collator

if TYPE_CHECKING:
    from raylava.train.engine import Engine

_ABOUT = "replay.json"
_WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class ReplayedSample:
    """One sample of the step, alone: its number and id, its loss a supervised token, its gradient's norm."""

    number: int
    sample_id: str
    loss: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def dump(spec: TrainSpec, engine: "Engine", step: Step, sample_ids: list[str]) -> str:
    """Write the trained weights as they are and what formed the step beside the run; returns where. For all ranks."""
    from safetensors.torch import save_file

    target = storage_path(spec.output) / f"replay-step-{step.number}"
    weights = engine.weights(only_trained=True)
    if weights is None:
        return target.uri
    settings = {
        field.name: getattr(spec, field.name)
        for field in dataclasses.fields(spec)
        if field.name not in ("model", "training", "vision", "language", "tracking")
    }
    about = settings | {
        "model": spec.model.model_dump(mode="json"),
        "training": spec.training.model_dump(mode="json"),
        "step": step.number,
        "samples": [int(number) for number in step.samples],
        "sample_ids": sample_ids,
    }
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: value.contiguous() for name, value in weights.items()}, Path(folder) / _WEIGHTS)
        (Path(folder) / _ABOUT).write_text(json.dumps(about, indent=2))
        target.upload_folder(Path(folder))
    return target.uri


def replay(folder: StoragePath) -> Iterator[ReplayedSample]:
    """Each sample of a dumped step, computed alone in fp32. Raises UserError where there is no dump."""
    from safetensors.torch import load_file

    if not (folder / _ABOUT).exists():
        raise UserError(f"{folder}: no dumped step there (no {_ABOUT}); a run that stopped tells its folder")
    about = json.loads((folder / _ABOUT).read_bytes())
    spec = _spec(about)
    llava = build_llava(spec.model, spec.vision, spec.seed, torch.float32)
    llava.load_state_dict(load_file((folder / _WEIGHTS).local_copy()), strict=False)
    set_trainable(llava, spec.stage, vision=spec.training.vision_lr is not None)
    loss, blocks, layout = PackLoss(llava), Blocks.at(storage_path(spec.blocks)), pack_collator(spec)
    for number in about["samples"]:
        sample = blocks[number]
        llava.zero_grad()
        pack = layout.tensors([sample])
        value = loss(**vars(pack)) / len(pack.labels)
        value.backward()
        gradients = [weight.grad.norm() for weight in llava.parameters() if weight.grad is not None]
        yield ReplayedSample(number, sample.sample_id, value.item(), torch.stack(gradients).norm().item())


def _spec(about: dict) -> TrainSpec:  # type: ignore[type-arg]
    model = Model.model_validate(about["model"])
    given = {name: about[name] for name in ("stage", "seed", "blocks", "connector", "image_aspect", "output")}
    return TrainSpec(
        model=model,
        vision=resolve_vision(model.vision),
        language=resolve_language(model.language),
        training=Training.model_validate(about["training"]),
        **given,
    )
