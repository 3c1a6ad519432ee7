"""This machine as a target: its memory, and how fast it was measured to be."""

import os

import psutil
import torch

from raylava.config.recipe import Recipe
from raylava.estimate.calibrate import load_calibration
from raylava.estimate.forecast import CORPUS_OF, KnownCorpora, StageName, Target, sizes, training_stages
from raylava.estimate.workload import Workload
from raylava.models.shapes import shape_of_model
from raylava.perf.memory import TrainableModel
from raylava.perf.search import DeviceBudget, usable_memory
from raylava.train.auto import CPU_SPEED, MEMORY_SHARE

_START = 20.0  # seconds from a stage's start to its first step: Ray's workers, imports, DeepSpeed
_DISK = 1 / 5e8  # seconds a byte of a checkpoint


def workloads(recipe: Recipe, given: KnownCorpora) -> dict[StageName, Workload]:
    """What the recipe's training stages have to compute."""
    shape = shape_of_model(recipe.model)
    corpora = sizes(recipe, shape, given)
    return {
        stage: Workload(
            TrainableModel.of(shape, stage, getattr(recipe, stage)),
            getattr(recipe, stage),
            corpora[CORPUS_OF[stage]],
            recipe.seed,
        )
        for stage in training_stages(recipe)
    }


def on_this_machine(recipe: Recipe, given: KnownCorpora) -> Target:
    """One node, at the speed that `--calibrate` measured, or at the order of magnitude of a core."""
    workers = recipe.resources.workers
    has_gpu = recipe.resources.gpus_per_worker > 0 and torch.cuda.is_available()
    host = psutil.virtual_memory().available * MEMORY_SHARE / workers
    memory = usable_memory(torch.cuda.mem_get_info()[1]) if has_gpu else host
    found = {stage: load_calibration(recipe, stage, workload) for stage, workload in workloads(recipe, given).items()}
    measured = {stage: one.speed for stage, one in found.items() if one is not None}
    return Target(
        label=f"this machine, {workers} workers",
        room=DeviceBudget(memory, host, workers, float("inf") if measured else 1e9),
        speed=next(iter(measured.values()), CPU_SPEED),
        start=_START,
        save=_DISK,
        cores=os.cpu_count() or 1,
        nodes=1,
        hourly=None,
        speeds=measured,
    )
