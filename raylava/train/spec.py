"""The description of one training stage, the same on every worker, and what follows from it directly.

Importing it does not import torch: drivers and trials build such descriptions and leave torch to the workers.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raylava.config.recipe import StageName, Tracking, Training
from raylava.corpus.blocks import Blocks
from raylava.corpus.shuffle import ShuffleWindows
from raylava.models.registry import ResolvedModel, load_tokenizer
from raylava.models.templates import IMAGE_TOKEN
from raylava.perf.memory import ExecutionConfig
from raylava.train.batch_plan import BatchPlan, plan_batches

if TYPE_CHECKING:
    from raylava.train.data_loader import PackCollator


@dataclass(frozen=True)
class TrainSpec:
    """Everything a worker needs: model, settings, the location of the blocks and of the output.

    `connector` is the connector artifact that finetuning starts from; `image_aspect` goes into the exported processor.
    A run that has saved no checkpoint continues from `initial_state`, the final state of a shorter run; one with
    `keep_final_state` leaves such a state in its artifact. `rejected_configs` ran out of memory in this run's dry run,
    so that `auto` settings need less than they did.
    """

    stage: StageName
    model: ResolvedModel
    training: Training
    seed: int
    blocks: str
    connector: str | None
    image_aspect: str
    output: str
    tracking: Tracking = field(default_factory=Tracking)
    initial_state: str | None = None
    keep_final_state: bool = False
    rejected_configs: tuple[ExecutionConfig, ...] = ()


def build_batch_plan(training: Training, seed: int, blocks: Blocks) -> BatchPlan:
    """Return the batch plan of a stage over a prepared corpus."""
    records = blocks.manifest.blocks
    windows = ShuffleWindows(
        tuple(record.rows for record in records),
        tuple(record.bytes for record in records),
        1e9 * training.shuffle_window_gb,
    )
    return plan_batches(training, seed, blocks.lengths, windows)


def build_collator(spec: TrainSpec) -> "PackCollator":
    """Return the collator for the stage's tokenizer and vision backbone."""
    from raylava.train.data_loader import PackCollator

    tokenizer = load_tokenizer(spec.model.language)
    ids = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, spec.model.language.template.begin])
    return PackCollator(spec.model.vision, *ids)
