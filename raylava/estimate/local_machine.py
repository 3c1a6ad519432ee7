"""This machine as a forecast target: its memory, and the speed that was measured on it."""

import os

import psutil
import torch

from raylava.config.recipe import Recipe, StageName
from raylava.estimate.calibrate import load_calibration
from raylava.estimate.forecast import STAGE_CORPUS, KnownCorpora, Target, corpus_sizes, training_stages
from raylava.estimate.workload import Workload
from raylava.models.shapes import model_shape
from raylava.perf.memory import TrainableModel
from raylava.perf.search import DeviceBudget, usable_memory
from raylava.train.auto import CPU_SPEED, HOST_MEMORY_FRACTION

_STARTUP_S = 20.0  # from the start of a stage to its first step: Ray workers, imports, DeepSpeed
_DISK_S_PER_BYTE = 1 / 5e8  # writing a checkpoint


def workloads(recipe: Recipe, known: KnownCorpora) -> dict[StageName, Workload]:
    """Return the workload of each training stage of the recipe."""
    shape = model_shape(recipe.model)
    corpora = corpus_sizes(recipe, shape, known)
    return {
        stage: Workload(
            TrainableModel.of(shape, stage, getattr(recipe, stage)),
            getattr(recipe, stage),
            corpora[STAGE_CORPUS[stage]],
            recipe.seed,
        )
        for stage in training_stages(recipe)
    }


def local_target(recipe: Recipe, known: KnownCorpora) -> Target:
    """Return this machine as a single node.

    Its speed is what `--calibrate` measured for each stage, or the nominal speed of a CPU core if nothing was measured.
    """
    workers = recipe.resources.workers
    has_gpu = recipe.resources.gpus_per_worker > 0 and torch.cuda.is_available()
    host = psutil.virtual_memory().available * HOST_MEMORY_FRACTION / workers
    memory = usable_memory(torch.cuda.mem_get_info()[1]) if has_gpu else host
    calibrations = {
        stage: load_calibration(recipe, stage, workload) for stage, workload in workloads(recipe, known).items()
    }
    speeds = {stage: calibration.speed for stage, calibration in calibrations.items() if calibration is not None}
    return Target(
        label=f"this machine, {workers} workers",
        budget=DeviceBudget(memory, host, workers, float("inf") if speeds else 1e9),
        speed=next(iter(speeds.values()), CPU_SPEED),
        startup_s=_STARTUP_S,
        checkpoint_s_per_byte=_DISK_S_PER_BYTE,
        cpu_cores=os.cpu_count() or 1,
        nodes=1,
        price_per_hour=None,
        speeds=speeds,
    )
