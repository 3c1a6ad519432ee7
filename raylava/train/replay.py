"""Dump a step with a non-finite loss at the end of a run, and recompute it sample by sample on any machine."""

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter

from raylava.config.recipe import Training
from raylava.corpus.block_cache import open_blocks
from raylava.errors import UserError, first_line
from raylava.local_copies import local_copy
from raylava.models.connector import load_connector
from raylava.models.llava import PackLoss, build_llava, set_trainable
from raylava.models.registry import ResolvedModel
from raylava.storage import StoragePath, storage_path
from raylava.train.batch_plan import Step
from raylava.train.spec import TrainSpec, build_collator

if TYPE_CHECKING:
    from raylava.train.engine import Engine

_DUMP_FILE = "replay.json"
_WEIGHTS_FILE = "weights.safetensors"
_PLAIN_FIELDS = ("stage", "seed", "blocks", "connector", "image_aspect", "output")


@dataclass(frozen=True)
class ReplayedSample:
    """One sample of the step computed by itself: its loss per loss token and its gradient norm."""

    number: int
    sample_id: str
    loss: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def dump_step(spec: TrainSpec, engine: "Engine", step: Step, sample_ids: list[str]) -> str:
    """Write the trained weights and the step's samples beside the run; return the folder. Called by all ranks."""
    from safetensors.torch import save_file

    target = storage_path(spec.output) / f"replay-step-{step.number}"
    weights = engine.weights(only_trained=True)
    if weights is None:
        return target.uri
    content = {name: getattr(spec, name) for name in _PLAIN_FIELDS} | {
        "model": dataclasses.asdict(spec.model),
        "training": spec.training.model_dump(mode="json"),
        "step": step.number,
        "samples": [int(number) for number in step.samples],
        "sample_ids": sample_ids,
    }
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: value.contiguous() for name, value in weights.items()}, Path(folder) / _WEIGHTS_FILE)
        (Path(folder) / _DUMP_FILE).write_text(json.dumps(content, indent=2))
        target.upload_folder(Path(folder))
    return target.uri


def replay(folder: StoragePath) -> Iterator[ReplayedSample]:
    """Yield each sample of a dumped step, computed by itself in fp32. Raises UserError where there is no dump."""
    from safetensors.torch import load_file

    if not (folder / _DUMP_FILE).exists():
        raise UserError(f"{folder}: no dumped step there (no {_DUMP_FILE}); the failed run's message names its folder")
    try:
        dump = json.loads((folder / _DUMP_FILE).read_bytes())
        spec, numbers = _read_spec(dump), list(dump["samples"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / _DUMP_FILE}: damaged ({first_line(error)}); give another dumped step") from error
    llava = build_llava(spec.model, spec.seed, torch.float32)
    if spec.connector:
        load_connector(llava, spec.connector)  # may bring a vision tower, which is frozen and so not in the dump
    llava.load_state_dict(load_file(local_copy(folder / _WEIGHTS_FILE)), strict=False)
    set_trainable(llava, spec.stage, vision=spec.training.vision_lr is not None)
    loss_function, blocks, collator = PackLoss(llava), open_blocks(storage_path(spec.blocks)), build_collator(spec)
    for number in numbers:
        sample = blocks[number]
        llava.zero_grad()
        pack = collator.collate([sample]).to(torch.device("cpu"), torch.float32)
        loss = loss_function(**vars(pack)) / len(pack.labels)
        loss.backward()
        grad_norms = [weight.grad.norm() for weight in llava.parameters() if weight.grad is not None]
        yield ReplayedSample(number, sample.sample_id, loss.item(), torch.stack(grad_norms).norm().item())


def _read_spec(dump: dict[str, Any]) -> TrainSpec:
    return TrainSpec(
        model=TypeAdapter(ResolvedModel).validate_python(dump["model"]),
        training=Training.model_validate(dump["training"]),
        **{name: dump[name] for name in _PLAIN_FIELDS},
    )
