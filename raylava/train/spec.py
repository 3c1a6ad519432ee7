"""What one training stage is to do, the same for every worker; what follows from it: its plan and its packs' layout."""

from dataclasses import dataclass, field

from raylava.config.recipe import Model, Tracking, Training
from raylava.corpus.blocks import Blocks
from raylava.models.llava import StageName
from raylava.models.registry import LanguageSpec, VisionSpec, load_tokenizer
from raylava.models.templates import IMAGE_TOKEN
from raylava.train.batch_plan import BatchPlan, ShuffleWindows
from raylava.train.data_loader import PackCollator

SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's record of the checkpoints that are whole, among them
CHECKPOINTS = "checkpoints"  # a run's folder within its spec; removed once the result stands


@dataclass(frozen=True)
class TrainSpec:
    """All that a worker needs, the same for each: settings, where blocks are read, and where the result goes."""

    stage: StageName
    model: Model
    vision: VisionSpec
    language: LanguageSpec
    training: Training
    seed: int
    blocks: str
    connector: str | None  # the connector artifact that finetuning starts from
    image_aspect: str
    output: str
    tracking: Tracking = field(default_factory=Tracking)


def epoch_plan(spec: TrainSpec, blocks: Blocks) -> BatchPlan:
    """The plan that the spec's settings make of a corpus."""
    training, records = spec.training, blocks.manifest.blocks
    windows = ShuffleWindows(
        tuple(record.rows for record in records),
        tuple(record.bytes for record in records),
        1e9 * training.shuffle_window_gb,
    )
    return BatchPlan(len(blocks), training.global_batch_size, training.epochs, spec.seed, training.max_steps, windows)


def pack_collator(spec: TrainSpec) -> PackCollator:
    """How samples lie in a pack for the spec's tokenizer and vision backbone."""
    tokenizer = load_tokenizer(spec.model.language)
    ids = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, spec.language.template.begin])
    return PackCollator(spec.vision, *ids)
