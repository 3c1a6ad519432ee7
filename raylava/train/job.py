"""What one training stage is to do, the same for every worker; what follows from it: its plan and its packs' layout."""

from dataclasses import dataclass, field

from raylava.corpus.blocks import Blocks
from raylava.model.backbones import LanguageSpec, VisionSpec, load_tokenizer
from raylava.model.llava import StageName
from raylava.model.templates import IMAGE_TOKEN
from raylava.recipe import Model, Tracking, Training
from raylava.train.feed import Layout
from raylava.train.plan import EpochPlan, Shelves

SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's record of the checkpoints that are whole, among them
CHECKPOINTS = "checkpoints"  # a run's folder within its draft; removed once the result stands


@dataclass(frozen=True)
class TrainJob:
    """All that a worker needs, the same for each: settings, where blocks are read, and where the result goes."""

    stage: StageName
    model: Model
    vision: VisionSpec
    language: LanguageSpec
    training: Training
    seed: int
    blocks: str
    connector: str | None  # the connector artifact that finetuning starts from
    fit: str
    output: str
    tracking: Tracking = field(default_factory=Tracking)


def epoch_plan(job: TrainJob, blocks: Blocks) -> EpochPlan:
    """The plan that the job's settings make of a corpus."""
    training, records = job.training, blocks.manifest.blocks
    shelves = Shelves(
        tuple(record.rows for record in records), tuple(record.bytes for record in records), 1e9 * training.shuffle_gb
    )
    return EpochPlan(len(blocks), training.global_batch, training.epochs, job.seed, training.max_steps, shelves)


def layout_of(job: TrainJob) -> Layout:
    """How samples lie in a pack for the job's tokenizer and vision backbone."""
    tokenizer = load_tokenizer(job.model.language)
    ids = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, job.language.template.begin])
    return Layout(job.vision, *ids)
