"""Measures how fast this machine trains a recipe: times a few steps on as many workers as it has, without Ray.

Random weights replace backbones that are not local folders, and the images are noise: neither changes the duration of
a step. The measurement is saved and reused by later estimates of the same stage on this machine.
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

from raylava.config.recipe import ImageEncoding, Model, Recipe, StageName
from raylava.corpus.images import decode_block_image, encode_image
from raylava.errors import RunError, UserError
from raylava.estimate.synthetic import synthetic_pack
from raylava.estimate.workload import Workload
from raylava.models.families.family import select_strategy
from raylava.models.hub import is_folder
from raylava.models.packs import PackTensors
from raylava.models.shapes import backbone_configs
from raylava.perf.shapes import LlavaShape
from raylava.perf.step_time import DeviceSpeed
from raylava.storage import cache_folder
from raylava.train.batch_plan import Pack, pack_batch

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


_STEPS = 8  # timed steps, after one warm-up step
_OVERHEAD_ROUNDS = 3  # repetitions of the tiny-pack timings
_MAX_SECONDS = 300.0  # no further timed step starts after this time
_RESULT = "calibration.json"

_StepPacks = tuple[list[PackTensors], float]  # this rank's packs of a step, and the FLOPs of its slowest rank


@dataclass(frozen=True)
class Calibration:
    """The measured speed of one stage; `startup_s` is the time from starting a worker process to its first step."""

    speed: DeviceSpeed
    startup_s: float


@dataclass(frozen=True)
class TimingSpec:
    """What each rank measures. `threads` is the number of CPU threads per rank, `device` is cpu or cuda."""

    recipe: Recipe
    workload: Workload
    stage: StageName
    world_size: int
    threads: int
    device: str
    folder: str


def calibrate(recipe: Recipe, stage: StageName, workload: Workload, folder: Path) -> Calibration:
    """Time the stage on this machine with the recipe's number of workers, or as many as it has devices for.

    Ranks write to `folder`; the result is saved for later estimates. Raises UserError if the recipe trains on GPUs and
    this machine has none, and RunError if a rank fails.
    """
    device = "cuda" if recipe.resources.gpus_per_worker else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--calibrate: the recipe trains on GPUs and this machine has none; run it on a GPU machine")
    max_workers = torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1
    world_size = min(recipe.resources.workers, max_workers)
    spec = TimingSpec(recipe, workload, stage, world_size, recipe.resources.cpus_per_worker, device, str(folder))
    try:
        spawn(_run_rank, (spec, time.time()), world_size, daemon=True)
    except (ProcessRaisedException, ProcessExitedException) as error:
        raise RunError(f"timing {stage} on this machine failed; see the log for the cause") from error
    calibration = _from_json((folder / _RESULT).read_text())
    save_calibration(recipe, stage, workload, calibration)
    return calibration


def save_calibration(recipe: Recipe, stage: StageName, workload: Workload, calibration: Calibration) -> None:
    """Save the calibration in the cache folder, for later estimates of the stage."""
    file = _calibration_file(recipe, stage, workload)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(calibration)))


def load_calibration(recipe: Recipe, stage: StageName, workload: Workload) -> Calibration | None:
    """Return the saved calibration of such a stage on this machine, or None if there is none."""
    file = _calibration_file(recipe, stage, workload)
    return _from_json(file.read_text()) if file.exists() else None


def _from_json(text: str) -> Calibration:
    data: dict[str, Any] = json.loads(text)
    return Calibration(**data | {"speed": DeviceSpeed(**data["speed"])})


def _calibration_file(recipe: Recipe, stage: StageName, workload: Workload) -> Path:
    training = workload.training
    names = ("max_tokens_per_pack", "zero", "attn_implementation", "activation_checkpointing", "compile", "precision")
    settings = training.model_dump(include=set(names))
    stage_fields = [asdict(workload.model), settings, recipe.resources.model_dump(), stage]
    machine = [platform.node(), platform.processor(), os.cpu_count()]
    name = hashlib.sha256(json.dumps([machine, stage_fields], sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "calibrations" / f"{name}.json"


def _run_rank(rank: int, spec: TimingSpec, start_time: float) -> None:
    """Run one rank's process; rank 0 writes the result."""
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": spec.device}
    torch.set_num_threads(spec.threads)
    device = torch.device(spec.device, rank) if spec.device == "cuda" else torch.device("cpu")
    rendezvous = f"file://{Path(spec.folder).absolute()}/rendezvous"
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=spec.world_size)
    calibration = _StageBenchmark(spec, rank, device).run(start_time)
    if rank == 0:
        (Path(spec.folder) / _RESULT).write_text(json.dumps(asdict(calibration)))
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort an ordinary interpreter exit


class _StageBenchmark:
    """Times one stage on one rank."""

    def __init__(self, spec: TimingSpec, rank: int, device: torch.device) -> None:
        from raylava.models.llava import DTYPES
        from raylava.train.auto import AutoResolver
        from raylava.train.engine import Engine

        self._spec, self._rank, self._device = spec, rank, device
        workload, stage = spec.workload, spec.stage
        llava = _model(spec.recipe, DTYPES[workload.training.precision], workload.training.attn_implementation)
        plan = workload.plan_of_known_lengths
        resolver = AutoResolver(stage, workload.model.shape, workload.corpus.lengths, plan, device)
        resolved = resolver.resolve_auto(workload.training)
        self._config = resolved.candidate.config
        self._engine: Engine = Engine(llava, stage, resolved.training, _STEPS + 1, device)
        self._image_token = int(llava.config.image_token_index)

    def run(self, start_time: float) -> Calibration:
        """Time a warm-up step, the timed steps, and steps of tiny packs, which give the overhead per pack and step."""
        steps = list(self._sample_steps())
        self._step_seconds(0, steps[0][0])
        startup_s = time.time() - start_time
        timings = [
            (self._step_seconds(number + 1, packs), flops, len(packs))
            for number, (packs, flops) in self._until_deadline(steps)
        ]
        seconds, flops, packs = (mean(timing[column] for timing in timings) for column in range(3))
        one_pack, four_packs = (
            median(self._step_seconds(1, [self._tiny_pack()] * count) for _ in range(_OVERHEAD_ROUNDS))
            for count in (1, 4)
        )
        pack_overhead = max(0.0, (four_packs - one_pack) / 3)
        step_overhead = max(0.0, one_pack - pack_overhead)
        compute_seconds = max(seconds - packs * pack_overhead - step_overhead, 0.1 * seconds)
        steps_and_workers = f"{len(timings)} steps, {self._spec.world_size} workers on {self._device.type}"
        speed = DeviceSpeed(
            flops_per_s=flops / compute_seconds,
            s_per_pack=pack_overhead,
            s_per_step=step_overhead,
            s_per_parameter_update=0.0,
            collective_latency_s=0.0,
            source=f"measured on this machine: {steps_and_workers}",
            s_per_image_decode=self._decode_seconds() if self._device.type == "cpu" else 0.0,
        )
        return Calibration(speed, startup_s)

    def _until_deadline(self, steps: list[_StepPacks]) -> Iterator[tuple[int, _StepPacks]]:
        """Yield up to `_STEPS` steps with their numbers, and stop on all ranks once any has exceeded the time."""
        start = time.monotonic()
        for number, step in enumerate(itertools.islice(itertools.cycle(steps[1:] or steps), _STEPS)):
            is_late = torch.tensor(float(number > 1 and time.monotonic() - start > _MAX_SECONDS), device=self._device)
            dist.all_reduce(is_late, dist.ReduceOp.MAX)
            if is_late.item():
                return
            yield number, step

    def _step_seconds(self, number: int, packs: list[PackTensors]) -> float:
        """Run one step and return its duration on the slowest rank, in seconds."""
        seconds = torch.tensor(self._engine.step(number, packs).seconds, device=self._device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds)

    def _sample_steps(self) -> Iterator[_StepPacks]:
        """Yield this rank's packs of some of the run's steps, with the FLOPs of the rank that computes most."""
        workload, world_size = self._spec.workload, self._spec.world_size
        lengths, config = workload.corpus.lengths, self._config
        for samples in workload.sampled_steps.steps[: _STEPS + 1]:
            ranks = pack_batch(samples, lengths.length, world_size, config.max_tokens_per_pack)
            _, flops, forward = workload.sampled_steps.slowest_rank(ranks)
            packs = [self._synthetic_pack(pack) for pack in ranks[self._rank]]
            yield packs, flops + forward * config.activation_checkpointing

    def _tiny_pack(self) -> PackTensors:
        return synthetic_pack([(2 + self._shape.vision.patches, 1, 1)], self._shape, self._image_token)

    @property
    def _shape(self) -> LlavaShape:
        return self._spec.workload.model.shape

    def _synthetic_pack(self, pack: Pack) -> PackTensors:
        """Return a synthetic pack of samples with the lengths of the given ones."""
        lengths = self._spec.workload.corpus.lengths
        sizes = [
            (int(lengths.length[sample]), int(lengths.images[sample]), int(lengths.loss_tokens[sample]))
            for sample in pack
        ]
        return synthetic_pack(sizes, self._shape, self._image_token)

    def _decode_seconds(self) -> float:
        """Return the time to decode one stored image, in seconds, on a core that computes as well."""
        vision = self._shape.vision
        side = int(vision.patches**0.5) * vision.patch
        corpora = self._spec.recipe.corpora
        corpus = corpora.alignment if self._spec.stage == "pretrain" else corpora.instruction
        noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        stored = encode_image(noise, corpus.image_encoding if corpus else ImageEncoding())
        start = time.monotonic()
        for _ in range(20):
            decode_block_image(stored).astype(np.float32)
        return (time.monotonic() - start) / 20


def _model(recipe: Recipe, dtype: torch.dtype, attention: str) -> "LlavaForConditionalGeneration":
    """Build the recipe's model from its weights if both backbones are local folders, else with random weights."""
    from raylava.models.llava import build_llava
    from raylava.models.registry import resolve_model

    model = recipe.model
    if is_folder(model.language.name) and is_folder(model.vision.name):
        return build_llava(resolve_model(model), 0, dtype, attention)
    return random_llava(model, dtype, attention)


def random_llava(model: Model, dtype: torch.dtype, attention: str) -> "LlavaForConditionalGeneration":
    """Return a randomly initialized model with the recipe's backbone shapes, on torch's default device."""
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    from raylava.models.llava import set_attn_implementation

    backbones = backbone_configs(model)
    shape = backbones.shape
    config = LlavaConfig(
        vision_config=AutoConfig.for_model(**backbones.vision),
        text_config=AutoConfig.for_model(**backbones.language),
        image_token_index=shape.language.vocabulary - 1,
        image_seq_length=shape.vision.patches,
        vision_feature_layer=backbones.vision_family.feature_layer,
        vision_feature_select_strategy=select_strategy(shape.vision),
        tie_word_embeddings=shape.language.is_tied,
    )
    torch.set_default_dtype(dtype)
    try:
        llava = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    set_attn_implementation(llava, attention)
    return llava
