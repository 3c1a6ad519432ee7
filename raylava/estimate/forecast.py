"""A recipe on a cluster → each stage's size, memory, time and cost; what would be cheapest, and why the rest is not.

Pure but for the configuration files and the prepared corpora that it reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from raylava.config.recipe import Corpus, Recipe, Training
from raylava.errors import UserError
from raylava.estimate.ingest import Ingest, IngestPlan, Store, plan
from raylava.estimate.workload import CorpusName, CorpusSize, Workload, assumed
from raylava.models.shapes import shape_of_model
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
from raylava.perf.step_time import Speed

StageName = Literal["pretrain", "finetune"]
CORPUS_OF: dict[StageName, CorpusName] = {"pretrain": "alignment", "finetune": "instruction"}


@dataclass(frozen=True)
class Target:
    """Where it is to run: the room for each worker, how fast one is, seconds from a stage's start to its first step,
    seconds that training stands still for a checkpoint's byte, cores for preparing, and the price of an hour of all
    nodes.
    """

    label: str
    room: DeviceBudget
    speed: Speed
    start: float
    save: float
    cores: int
    nodes: int
    hourly: float | None
    speeds: Mapping[StageName, Speed] = field(default_factory=dict)

    def speed_of(self, stage: StageName) -> Speed:
        """The stage's own, where it was measured."""
        return self.speeds.get(stage, self.speed)


_HOST_COPY = 1 / 5e9  # seconds a byte, from a GPU to its host
_START = 90.0  # Ray's workers, imports, DeepSpeed
_LOAD = 1e9  # bytes/s, weights from storage or a page cache
_CORES_A_GPU = 12


def on_gpus(cluster: Cluster, speed: Speed) -> Target:
    """A cluster of GPUs."""
    device = cluster.device
    return Target(
        label=f"{cluster.nodes} × {cluster.gpus} {device.name}",
        room=DeviceBudget(usable_memory(device.memory), None, cluster.world_size, cluster.bandwidth),
        speed=speed,
        start=_START,
        save=_HOST_COPY,
        cores=_CORES_A_GPU * cluster.gpus,
        nodes=cluster.nodes,
        hourly=None if cluster.price is None else cluster.price * cluster.nodes,
    )


@dataclass(frozen=True)
class StageForecast:
    """A training stage on a target. `asked` is the way that the recipe takes (the cheapest of those it leaves open),
    `best` the cheapest of all; None where none fits.
    """

    stage: StageName
    workload: Workload
    target: Target
    asked: Candidate
    best: Candidate | None
    options: tuple[Candidate, ...]

    @property
    def steps(self) -> int:
        """Of the run."""
        return self.workload.plan.steps

    @cached_property
    def flops(self) -> StepFlops:
        """Of a step, all ranks together."""
        return self.workload.sampled.flops()

    @property
    def model(self) -> TrainableModel:
        """What trains."""
        return self.workload.model

    @property
    def seconds(self) -> float:
        """From its start to its result."""
        model, target = self.model, self.target
        training = self.steps * self.asked.seconds.total
        saves = max(1, int(training / (60 * self.workload.training.checkpoint.interval_minutes)))
        load = model.shape.parameters * model.value / _LOAD
        return target.start + load + training + saves * self.checkpoint / target.room.world_size * target.save

    @property
    def checkpoint(self) -> float:
        """Bytes of one, all ranks together."""
        return checkpoint_bytes(self.model, self.asked.way)

    @property
    def result(self) -> float:
        """Bytes of the artifact."""
        return result_bytes(self.model)

    @property
    def largest_pack(self) -> int | None:
        """In tokens, of the sizes weighed, that fits with the recipe's settings; None where none does."""
        like = [one for one in self.options if one.way.mode == self.asked.way.mode and not one.infeasible]
        return max((one.way.max_tokens_per_pack for one in like), default=None)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over what the devices could, when these are known by their peak."""
        peak = self.target.speed_of(self.stage).peak
        if peak is None:
            return None
        return self.flops.total / self.asked.seconds.total / (peak * self.target.room.world_size)


@dataclass(frozen=True)
class Forecast:
    """A recipe on a target. `prepare` has the corpora that are not prepared yet."""

    name: str
    shape: LlavaShape
    target: Target
    corpora: Mapping[CorpusName, CorpusSize]
    prepare: Mapping[CorpusName, IngestPlan]
    stages: tuple[StageForecast, ...]

    @property
    def hours(self) -> float:
        """Of the cluster, all stages one after another."""
        preparing = sum(one.hours for one in self.prepare.values())
        return preparing + sum(one.seconds for one in self.stages) / 3600

    @property
    def node_hours(self) -> float:
        """Hours × nodes."""
        return self.hours * self.target.nodes

    @property
    def cost(self) -> float | None:
        """In the price table's currency."""
        return None if self.target.hourly is None else self.hours * self.target.hourly

    @property
    def fits(self) -> bool:
        """Whether every stage does, as the recipe has it."""
        return all(not one.asked.infeasible for one in self.stages)


@dataclass(frozen=True)
class KnownCorpora:
    """What is known of the corpora: those that are prepared, and rows of those that are not."""

    corpora: Mapping[CorpusName, CorpusSize]
    rows: Mapping[CorpusName, int]


def forecast(recipe: Recipe, target: Target, given: KnownCorpora, weighs_all: bool = True) -> Forecast:
    """The recipe on the target; without `weighs_all` only as the recipe has it.

    Raises UserError for a corpus that nothing is known of, or a backbone whose configuration cannot be read.
    """
    shape = shape_of_model(recipe.model)
    corpora = sizes(recipe, shape, given)
    stages = tuple(_stage(recipe, stage, shape, corpora, target, weighs_all) for stage in training_stages(recipe))
    preparing = {
        CORPUS_OF[stage]: _ingest(recipe, stage, corpora[CORPUS_OF[stage]], target)
        for stage in training_stages(recipe)
        if not corpora[CORPUS_OF[stage]].is_prepared
    }
    return Forecast(recipe.name, shape, target, corpora, preparing, stages)


def training_stages(recipe: Recipe) -> list[StageName]:
    """Those that the recipe runs."""
    connector = recipe.pretrain.enabled and recipe.model.connector.weights is None
    return ["pretrain", "finetune"] if connector else ["finetune"]


def sizes(recipe: Recipe, shape: LlavaShape, given: KnownCorpora) -> dict[CorpusName, CorpusSize]:
    """Of the corpora that the recipe's stages read."""
    found: dict[CorpusName, CorpusSize] = {}
    for stage in training_stages(recipe):
        name, corpus = CORPUS_OF[stage], _corpus(recipe, stage)
        pixels = int(shape.vision.patches**0.5) * shape.vision.patch
        known = given.corpora.get(name)
        found[name] = known or assumed(name, corpus, shape.vision.patches, pixels, given.rows.get(name))
    return found


def _stage(
    recipe: Recipe,
    stage: StageName,
    shape: LlavaShape,
    corpora: Mapping[CorpusName, CorpusSize],
    target: Target,
    weighs_all: bool,
) -> StageForecast:
    training: Training = getattr(recipe, stage)
    model = TrainableModel.of(shape, stage, training)
    workload = Workload(model, training, corpora[CORPUS_OF[stage]], recipe.seed)
    if training.max_tokens_per_pack != "auto" and training.max_tokens_per_pack < workload.longest:
        raise UserError(
            f"{stage}.max_tokens_per_pack={training.max_tokens_per_pack} is less than the corpus's longest sample, "
            f"{workload.longest} tokens; raise it, or set it to auto"
        )
    room, speed = target.room, target.speed_of(stage)
    work, longest = workload.sampled.work(room.world_size), max(workload.longest, _corpus(recipe, stage).max_length)
    asked = rank_candidates(recipe_candidates(training, longest), model, work, speed, room)
    every = rank_candidates(all_execution_configs(training, longest), model, work, speed, room) if weighs_all else asked
    return StageForecast(stage, workload, target, select(asked), fastest_feasible(every), tuple(every))


def _corpus(recipe: Recipe, stage: StageName) -> Corpus:
    found = recipe.corpora.alignment if stage == "pretrain" else recipe.corpora.instruction
    assert found is not None
    return found


def _ingest(recipe: Recipe, stage: StageName, size: CorpusSize, target: Target) -> IngestPlan:
    corpus, images = _corpus(recipe, stage), max(1, round(size.images))
    remote = any("://" in place for source in corpus.sources for place in (recipe.data, source.images))
    store, each = Store() if remote else Store.disk(), size.bytes / images
    ingest = Ingest(images, target.cores, block_bytes=each, samples_per_block=corpus.samples_per_block, store=store)
    return plan(ingest, target.nodes)
