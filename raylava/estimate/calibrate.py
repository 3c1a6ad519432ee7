"""How fast this machine trains a recipe: a few of its steps, timed, with as many workers as it has, without Ray.

The model has random weights where a backbone's own are not in a folder here, the images are noise: neither changes
how long a step takes. What is found is kept for the next estimate of the same stage on this machine.
"""

import hashlib
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from raylava.config.recipe import ImageEncoding, Model, Recipe
from raylava.corpus.images import decode_stored, encode
from raylava.errors import RunError, UserError
from raylava.estimate.synthetic import synthetic_pack
from raylava.estimate.workload import Workload
from raylava.models.llava import PackTensors
from raylava.models.registry import is_folder
from raylava.models.shapes import configs_of_model
from raylava.perf.shapes import LlavaShape
from raylava.perf.step_time import Speed
from raylava.storage import cache_folder
from raylava.train.batch_plan import Pack, pack_batch

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


_STEPS = 8  # timed, besides one that is not
_ROUNDS = 3
_MAX_SECONDS = 300.0  # of timed steps, after which no further one begins


@dataclass(frozen=True)
class Calibration:
    """What was measured of one stage: see Speed; `start` in seconds, from a worker's process to its first step."""

    speed: Speed
    start: float


@dataclass(frozen=True)
class Timing:
    """What one rank is to time. `threads` of the CPU, `device` cpu or cuda."""

    recipe: Recipe
    workload: Workload
    stage: str
    world_size: int
    threads: int
    device: str
    folder: str


def calibrate(recipe: Recipe, stage: str, workload: Workload, folder: Path) -> Calibration:
    """Time the stage here, with the recipe's workers (those of them that have a GPU, where it asks for GPUs).

    `folder` is for what ranks write. Raises UserError where there is no GPU for them, RunError when a rank fails.
    """
    device = "cuda" if recipe.resources.gpus_per_worker else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--calibrate: the recipe trains on GPUs and this machine has none; run it where one is")
    most = torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1
    world_size = min(recipe.resources.workers, most)
    timing = Timing(recipe, workload, stage, world_size, recipe.resources.cpus_per_worker, device, str(folder))
    try:
        spawn(_rank, (timing, time.time()), world_size, daemon=True)
    except (ProcessRaisedException, ProcessExitedException) as error:
        raise RunError(f"timing {stage} on this machine failed; the log has why") from error
    found = _kept(json.loads((folder / "timed.json").read_text()))
    save_calibration(recipe, stage, workload, found)
    return found


def save_calibration(recipe: Recipe, stage: str, workload: Workload, found: Calibration) -> None:
    """For the next estimate."""
    file = _file(recipe, stage, workload)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(found)))


def load_calibration(recipe: Recipe, stage: str, workload: Workload) -> Calibration | None:
    """What was measured of such a stage on this machine, if it was."""
    file = _file(recipe, stage, workload)
    return _kept(json.loads(file.read_text())) if file.exists() else None


def _kept(data: dict[str, Any]) -> Calibration:
    return Calibration(**data | {"speed": Speed(**data["speed"])})


def _file(recipe: Recipe, stage: str, workload: Workload) -> Path:
    training = workload.training
    names = ("max_tokens_per_pack", "zero", "attention", "activation_checkpointing", "compile", "precision")
    settings = training.model_dump(include=set(names))
    decides = [asdict(workload.model), settings, recipe.resources.model_dump(), stage]
    machine = [platform.node(), platform.processor(), os.cpu_count()]
    name = hashlib.sha256(json.dumps([machine, decides], sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "calibrations" / f"{name}.json"


def _rank(rank: int, timing: Timing, started: float) -> None:
    """One process: set up, time, write on rank 0."""
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": timing.device}
    torch.set_num_threads(timing.threads)
    device = torch.device(timing.device, rank) if timing.device == "cuda" else torch.device("cpu")
    rendezvous = f"file://{Path(timing.folder).absolute()}/rendezvous"
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=timing.world_size)
    found = _Bench(timing, rank, device).run(started)
    if rank == 0:
        (Path(timing.folder) / "timed.json").write_text(json.dumps(asdict(found)))
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort an ordinary interpreter exit


class _Bench:
    """One rank's timing of one stage."""

    def __init__(self, timing: Timing, rank: int, device: torch.device) -> None:
        from raylava.train.auto import AutoResolver
        from raylava.train.engine import DTYPES, Engine

        self._timing, self._rank, self._device = timing, rank, device
        workload, recipe = timing.workload, timing.recipe
        llava = _model(recipe, DTYPES[workload.training.precision], workload.training.attn_implementation)
        stage: Any = timing.stage
        plan = workload.plan_of_known
        resolver = AutoResolver(stage, workload.model.shape, workload.corpus.lengths, plan, device)
        resolved = resolver.resolve_auto(workload.training)
        self._way = resolved.option.way
        self._engine: Engine = Engine(llava, stage, resolved.training, _STEPS + 1, device)
        self._image_token = int(llava.config.image_token_index)

    def run(self, started: float) -> Calibration:
        """A step to warm up, the timed ones, and tiny packs, which tell what a pack and a step cost besides."""
        steps = list(self._steps())
        self._timed(0, steps[0][0])
        start = time.time() - started
        timed = [(self._timed(number + 1, packs), flops, len(packs)) for number, (packs, flops) in self._some(steps)]
        seconds, flops, packs = (mean(one[part] for one in timed) for part in range(3))
        one, four = (median(self._timed(1, [self._tiny()] * count) for _ in range(_ROUNDS)) for count in (1, 4))
        pack = max(0.0, (four - one) / 3)
        step = max(0.0, one - pack)
        computing = max(seconds - packs * pack - step, 0.1 * seconds)
        speed = Speed(
            flops=flops / computing,
            pack=pack,
            step=step,
            update=0.0,
            latency=0.0,
            source=f"measured here: {len(timed)} steps, {self._timing.world_size} workers on {self._device.type}",
            image=self._image_seconds() if self._device.type == "cpu" else 0.0,
        )
        return Calibration(speed, start)

    def _some(self, steps: list[tuple[list[PackTensors], float]]) -> Iterator[tuple[int, Any]]:
        began = time.monotonic()
        for number, step in enumerate(itertools.islice(itertools.cycle(steps[1:] or steps), _STEPS)):
            late = torch.tensor(float(number > 1 and time.monotonic() - began > _MAX_SECONDS), device=self._device)
            dist.all_reduce(late, dist.ReduceOp.MAX)
            if late.item():
                return
            yield number, step

    def _timed(self, number: int, packs: list[PackTensors]) -> float:
        """Seconds of a step, on the slowest rank."""
        seconds = torch.tensor(self._engine.step(number, packs, 1000).seconds, device=self._device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds)

    def _steps(self) -> Iterator[tuple[list[PackTensors], float]]:
        """This rank's packs of some of the run's steps, and the FLOPs of the rank that has most to do in each."""
        workload, world_size = self._timing.workload, self._timing.world_size
        for samples in workload.sampled.steps[: _STEPS + 1]:
            ranks = pack_batch(samples, workload.corpus.lengths.length, world_size, self._way.max_tokens_per_pack)
            _, flops, forward = workload.sampled.slowest(ranks)
            yield [self._pack(pack) for pack in ranks[self._rank]], flops + forward * self._way.activation_checkpointing

    def _tiny(self) -> PackTensors:
        return synthetic_pack([(2 + self._shape.vision.patches, 1, 1)], self._shape, self._image_token)

    @property
    def _shape(self) -> LlavaShape:
        return self._timing.workload.model.shape

    def _pack(self, pack: Pack) -> PackTensors:
        lengths = self._timing.workload.corpus.lengths
        samples = [
            (int(lengths.length[number]), int(lengths.images[number]), int(lengths.loss_tokens[number]))
            for number in pack
        ]
        return synthetic_pack(samples, self._shape, self._image_token)

    def _image_seconds(self) -> float:
        """To decode one as blocks hold it, on the core that computes as well."""
        vision = self._shape.vision
        side = int(vision.patches**0.5) * vision.patch
        corpora = self._timing.recipe.corpora
        corpus = corpora.alignment if self._timing.stage == "pretrain" else corpora.instruction
        noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        stored = encode(noise, corpus.image_encoding if corpus else ImageEncoding())
        began = time.monotonic()
        for _ in range(20):
            decode_stored(stored).astype(np.float32)
        return (time.monotonic() - began) / 20


def _model(recipe: Recipe, dtype: torch.dtype, attention: str) -> "LlavaForConditionalGeneration":
    """With its weights where both backbones are folders, else with random ones."""
    from raylava.models.llava import build_llava
    from raylava.models.registry import resolve_vision

    model = recipe.model
    if is_folder(model.language.name) and is_folder(model.vision.name):
        return build_llava(model, resolve_vision(model.vision), 0, dtype, attention)
    return random_llava(model, dtype, attention)


def random_llava(model: Model, dtype: torch.dtype, attention: str) -> "LlavaForConditionalGeneration":
    """Of the dimensions of the recipe's backbones, on torch's default device."""
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    from raylava.models.attention import register

    register()
    language, vision, patches = configs_of_model(model)
    config = LlavaConfig(
        vision_config=AutoConfig.for_model(**vision),
        text_config=AutoConfig.for_model(**language),
        image_token_index=language["vocab_size"] - 1,
        image_seq_length=patches,
        vision_feature_select_strategy="full" if vision["model_type"].startswith("siglip") else "default",
        tie_word_embeddings=True,
    )
    config.text_config._attn_implementation = attention
    torch.set_default_dtype(dtype)
    try:
        return LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
