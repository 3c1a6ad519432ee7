"""The samples of each training step, recomputed from an artifact's record, so that another trainer can replay a run."""

from collections.abc import Iterator
from dataclasses import dataclass

from raylava.artifacts import Artifact
from raylava.config.recipe import Training
from raylava.corpus.block_cache import open_blocks
from raylava.errors import UserError
from raylava.storage import storage_path
from raylava.train.spec import build_batch_plan

_CACHE_BYTES = 20e9  # of blocks in a bucket, while their sample ids are read
_DERIVED_FIELDS = ("deepspeed", "keep_best")  # of a record's training settings; they do not affect the plan


@dataclass(frozen=True)
class PlannedStep:
    """The sample ids of one step in plan order, by loss group; one group where the loss is a mean over loss tokens."""

    step: int
    epoch: int
    groups: list[list[str]]


def planned_steps(artifact: Artifact, first: int = 0, last: int | None = None) -> Iterator[PlannedStep]:
    """Yield the steps of a training stage from `first` to `last`, both included.

    Raises UserError when the artifact is not of a training stage, or when its blocks are no longer in storage.
    """
    if artifact.stage not in ("pretrain", "finetune"):
        raise UserError(f"{artifact.path}: an artifact of {artifact.stage}; give one of pretrain or finetune")
    fields = artifact.record["fingerprint_fields"]
    if not {"blocks", "training", "seed"} <= fields.keys():
        raise UserError(f"{artifact.path}: its record does not describe a training stage; build the artifact again")
    root = artifact.path.uri.rsplit("/", 2)[0]
    folder = storage_path(f"{root}/prepare/{fields['blocks']}")
    if not folder.exists():
        raise UserError(f"{folder}: the blocks of {artifact.path} are not there; keep them in the same storage")
    settings = {name: value for name, value in fields["training"].items() if name not in _DERIVED_FIELDS}
    training = Training.model_validate(settings)
    blocks = open_blocks(folder, _CACHE_BYTES)
    plan = build_batch_plan(training, fields["seed"], blocks)
    for step in plan.from_step(first):
        if last is not None and step.number > last:
            return
        ids = [blocks[number].sample_id for number in step.samples.tolist()]
        size = plan.groups.size if plan.groups else len(ids)
        yield PlannedStep(step.number, step.epoch, [ids[start : start + size] for start in range(0, len(ids), size)])
