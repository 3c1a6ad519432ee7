"""Predicts the size, memory, time and cost of each stage of a recipe on a cluster, and compares execution configs.

Reads only the backbones' configuration files and the metadata of prepared corpora.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from raylava.config.recipe import Corpus, Recipe, StageName, Training
from raylava.errors import UserError
from raylava.estimate.ingest import IngestPlan, IngestSpec, StorageLimits, plan_ingest
from raylava.estimate.workload import CorpusName, CorpusSize, Workload, assumed_corpus
from raylava.models.shapes import model_shape
from raylava.perf.flops import StepFlops
from raylava.perf.hardware import Cluster
from raylava.perf.memory import TrainableModel, checkpoint_bytes, result_bytes
from raylava.perf.search import (
    Candidate,
    DeviceBudget,
    all_execution_configs,
    fastest_feasible,
    rank_candidates,
    recipe_candidates,
    select,
    usable_memory,
)
from raylava.perf.shapes import LlavaShape
from raylava.perf.step_time import DeviceSpeed

STAGE_CORPUS: dict[StageName, CorpusName] = {"pretrain": "alignment", "finetune": "instruction"}


@dataclass(frozen=True)
class Target:
    """The hardware to predict for: memory and bandwidth of each worker, its speed, and the price of all nodes.

    `startup_s` is the time from the start of a stage to its first step; `checkpoint_s_per_byte` is how long training
    stalls per byte of a worker's checkpoint; `cpu_cores` are those of a node, for preparing corpora. `speeds` overrides
    `speed` for stages that were measured.
    """

    label: str
    budget: DeviceBudget
    speed: DeviceSpeed
    startup_s: float
    checkpoint_s_per_byte: float
    cpu_cores: int
    nodes: int
    price_per_hour: float | None
    speeds: Mapping[StageName, DeviceSpeed] = field(default_factory=dict)

    def speed_of(self, stage: StageName) -> DeviceSpeed:
        """Return the measured speed of the stage, or the target's nominal speed if it was not measured."""
        return self.speeds.get(stage, self.speed)


_DEVICE_TO_HOST_S_PER_BYTE = 1 / 5e9
_STARTUP_S = 90.0  # Ray workers, imports, DeepSpeed initialization
_WEIGHT_LOAD_RATE = 1e9  # bytes/s, from storage or the page cache
_CPU_CORES_PER_GPU = 12


def gpu_target(cluster: Cluster, speed: DeviceSpeed) -> Target:
    """Return the target for a cluster of GPUs whose workers train at `speed`."""
    device = cluster.device
    return Target(
        label=f"{cluster.nodes} × {cluster.gpus} {device.name}",
        budget=DeviceBudget(usable_memory(device.memory), None, cluster.world_size, cluster.bandwidth),
        speed=speed,
        startup_s=_STARTUP_S,
        checkpoint_s_per_byte=_DEVICE_TO_HOST_S_PER_BYTE,
        cpu_cores=_CPU_CORES_PER_GPU * cluster.gpus,
        nodes=cluster.nodes,
        price_per_hour=None if cluster.price_per_hour is None else cluster.price_per_hour * cluster.nodes,
    )


@dataclass(frozen=True)
class StageForecast:
    """The prediction for one training stage on a target.

    `planned` is the candidate that the recipe selects among the settings it leaves open; `best` is the fastest feasible
    of all `candidates`, or None if none fits.
    """

    stage: StageName
    workload: Workload
    target: Target
    planned: Candidate
    best: Candidate | None
    candidates: tuple[Candidate, ...]

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the stage."""
        return self.workload.plan.steps

    @cached_property
    def flops(self) -> StepFlops:
        """FLOPs of the median step, summed over all ranks."""
        return self.workload.sampled_steps.flops()

    @property
    def model(self) -> TrainableModel:
        """The model, with the parts that this stage trains."""
        return self.workload.model

    @property
    def seconds(self) -> float:
        """Duration of the stage in seconds: startup, loading weights, training and checkpoint stalls."""
        model, target = self.model, self.target
        training = self.steps * self.planned.seconds.total
        saves = max(1, int(training / (60 * self.workload.training.checkpoint.interval_minutes)))
        load = model.shape.parameters * model.bytes_per_value / _WEIGHT_LOAD_RATE
        checkpoint_share = saves * self.checkpoint / target.budget.world_size
        return target.startup_s + load + training + checkpoint_share * target.checkpoint_s_per_byte

    @property
    def checkpoint(self) -> float:
        """Size of one checkpoint in bytes, summed over all ranks."""
        return checkpoint_bytes(self.model, self.planned.config)

    @property
    def result(self) -> float:
        """Size of the stage's artifact in bytes."""
        return result_bytes(self.model)

    @property
    def largest_pack(self) -> int | None:
        """Largest feasible pack size in tokens among candidates with the planned settings; None if none is feasible."""
        feasible = [
            candidate.config.max_tokens_per_pack
            for candidate in self.candidates
            if candidate.config.short_description == self.planned.config.short_description and not candidate.infeasible
        ]
        return max(feasible, default=None)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization of the devices; None if their peak is unknown."""
        peak = self.target.speed_of(self.stage).peak_flops
        if peak is None:
            return None
        return self.flops.total / self.planned.seconds.total / (peak * self.target.budget.world_size)


@dataclass(frozen=True)
class Forecast:
    """The prediction for a recipe on a target. `prepare` holds the plans of corpora that are not prepared yet."""

    name: str
    shape: LlavaShape
    target: Target
    corpora: Mapping[CorpusName, CorpusSize]
    prepare: Mapping[CorpusName, IngestPlan]
    stages: tuple[StageForecast, ...]

    @property
    def hours(self) -> float:
        """Hours on the cluster, with all stages run one after another."""
        preparing = sum(plan.hours for plan in self.prepare.values())
        return preparing + sum(stage.seconds for stage in self.stages) / 3600

    @property
    def node_hours(self) -> float:
        """Hours multiplied by the number of nodes."""
        return self.hours * self.target.nodes

    @property
    def cost(self) -> float | None:
        """Cost in the currency of the price table; None if no price is known."""
        return None if self.target.price_per_hour is None else self.hours * self.target.price_per_hour

    @property
    def fits(self) -> bool:
        """Whether every stage fits with the recipe's own settings."""
        return all(not stage.planned.infeasible for stage in self.stages)


@dataclass(frozen=True)
class KnownCorpora:
    """Known sizes of a recipe's corpora: those of prepared corpora, and row counts of corpora not prepared yet."""

    corpora: Mapping[CorpusName, CorpusSize]
    rows: Mapping[CorpusName, int]


def forecast(recipe: Recipe, target: Target, known: KnownCorpora, compare_all: bool = True) -> Forecast:
    """Predict the recipe on the target, comparing all execution configs or only those that the recipe allows.

    Raises UserError for a corpus of unknown size, for packs smaller than the longest sample, or for a backbone whose
    configuration cannot be read.
    """
    shape = model_shape(recipe.model)
    corpora = corpus_sizes(recipe, shape, known)
    stages = tuple(
        _forecast_stage(recipe, stage, shape, corpora, target, compare_all) for stage in training_stages(recipe)
    )
    ingest_plans = {
        STAGE_CORPUS[stage]: _plan_stage_ingest(recipe, stage, corpora[STAGE_CORPUS[stage]], target)
        for stage in training_stages(recipe)
        if not corpora[STAGE_CORPUS[stage]].is_prepared
    }
    return Forecast(recipe.name, shape, target, corpora, ingest_plans, stages)


def training_stages(recipe: Recipe) -> list[StageName]:
    """Return the training stages that the recipe runs, in order."""
    trains_connector = recipe.pretrain.enabled
    return ["pretrain", "finetune"] if trains_connector else ["finetune"]


def corpus_sizes(recipe: Recipe, shape: LlavaShape, known: KnownCorpora) -> dict[CorpusName, CorpusSize]:
    """Return the sizes of the corpora that the recipe's training stages read, assumed where they are not known."""
    sizes: dict[CorpusName, CorpusSize] = {}
    for stage in training_stages(recipe):
        name, corpus = STAGE_CORPUS[stage], _corpus_config(recipe, stage)
        pixels = int(shape.vision.patches**0.5) * shape.vision.patch
        size = known.corpora.get(name)
        sizes[name] = size or assumed_corpus(name, corpus, shape.vision.patches, pixels, known.rows.get(name))
    return sizes


def _forecast_stage(
    recipe: Recipe,
    stage: StageName,
    shape: LlavaShape,
    corpora: Mapping[CorpusName, CorpusSize],
    target: Target,
    compare_all: bool,
) -> StageForecast:
    training: Training = getattr(recipe, stage)
    model = TrainableModel.of(shape, stage, training)
    workload = Workload(model, training, corpora[STAGE_CORPUS[stage]], recipe.seed)
    if training.max_tokens_per_pack != "auto" and training.max_tokens_per_pack < workload.longest_sample:
        raise UserError(
            f"{stage}.max_tokens_per_pack={training.max_tokens_per_pack} is less than the corpus's longest sample, "
            f"{workload.longest_sample} tokens; raise it, or set it to auto"
        )
    budget, speed = target.budget, target.speed_of(stage)
    step_workload = workload.sampled_steps.workload(budget.world_size)
    longest = max(workload.longest_sample, _corpus_config(recipe, stage).max_length)
    allowed = rank_candidates(recipe_candidates(training, longest), model, step_workload, speed, budget)
    candidates = (
        rank_candidates(all_execution_configs(training, longest), model, step_workload, speed, budget)
        if compare_all
        else allowed
    )
    return StageForecast(stage, workload, target, select(allowed), fastest_feasible(candidates), tuple(candidates))


def _corpus_config(recipe: Recipe, stage: StageName) -> Corpus:
    corpus = recipe.corpora.alignment if stage == "pretrain" else recipe.corpora.instruction
    assert corpus is not None
    return corpus


def _plan_stage_ingest(recipe: Recipe, stage: StageName, size: CorpusSize, target: Target) -> IngestPlan:
    corpus, images = _corpus_config(recipe, stage), max(1, round(size.images))
    is_remote = any("://" in path for source in corpus.sources for path in (recipe.data, source.images))
    spec = IngestSpec(
        images,
        target.cpu_cores,
        block_bytes=size.bytes / images,
        samples_per_block=corpus.samples_per_block,
        storage=StorageLimits() if is_remote else StorageLimits.local_disk(),
    )
    return plan_ingest(spec, target.nodes)
