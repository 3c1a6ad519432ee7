"""One worker's loop: feed → engine → report. The only room, with trainer.py, where training meets Ray.

Every rank runs the same number of steps and packs; rank 0 keeps the ledger and tells the driver how far it is.
"""

import json
import logging
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode

from raylava.corpus.blocks import Blocks
from raylava.model.backbones import LanguageSpec, VisionSpec, load_tokenizer
from raylava.model.llava import CONNECTOR_FILE, StageName, assemble, load_connector
from raylava.model.publish import publish
from raylava.model.templates import IMAGE_TOKEN
from raylava.recipe import Model, Training
from raylava.storage import place
from raylava.train.engine import DTYPES, Engine, StepResult
from raylava.train.feed import Feed, Layout, StepWork
from raylava.train.plan import EpochPlan

logger = logging.getLogger(__name__)

LEDGER = "steps.jsonl"


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


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's loop function. `config` holds the TrainJob and the actor that collects progress."""
    job: TrainJob = config["job"]
    context = ray.train.get_context()
    torch.set_num_threads(config["threads"])
    device = ray.train.torch.get_device()
    blocks = Blocks.at(place(job.blocks))
    plan = epoch_plan(job, len(blocks))
    engine = _engine(job, plan, device)
    ledger = _Ledger(context.get_world_rank() == 0)
    first = _resume(engine, ledger)
    feed = Feed(
        blocks, plan, _layout(job), context.get_world_rank(), context.get_world_size(), job.training.pack_tokens, first
    )
    saver = _Saver(job.training)
    waiting_since = time.monotonic()
    for work in feed:
        waited = time.monotonic() - waiting_since
        result = engine.step(work.step.number, work.packs, work.supervised)
        ledger.add(work, result, waited, context.get_world_size())
        if ledger.keeps:
            config["progress"].update.remote(work.step.number + 1, plan.steps, loss=result.loss, lr=result.lr)
        if work.step.number + 1 < plan.steps and saver.due():
            saver.save(engine, ledger, work.step.number + 1)
        waiting_since = time.monotonic()
    _write_result(job, engine, ledger)


def epoch_plan(job: TrainJob, samples: int) -> EpochPlan:
    """The plan that the job's settings make of so many samples."""
    return EpochPlan(samples, job.training.global_batch, job.training.epochs, job.seed, job.training.max_steps)


def _layout(job: TrainJob) -> Layout:
    tokenizer = load_tokenizer(job.model.language)
    ids = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, job.language.template.begin])
    return Layout(job.vision, *ids)


def _engine(job: TrainJob, plan: EpochPlan, device: torch.device) -> Engine:
    training = job.training
    llava = assemble(job.model, job.vision, job.seed, DTYPES[training.precision], training.attention)
    if job.connector:
        load_connector(llava, job.connector)
    return Engine(llava, job.stage, training, plan.steps, device)


class _Ledger:
    """steps.jsonl, kept by rank 0: what was done in each step, and the proof that a resumed run did the same."""

    def __init__(self, keeps: bool) -> None:
        self.keeps = keeps
        self.lines: list[str] = []

    def add(self, work: StepWork, result: StepResult, waited: float, world_size: int) -> None:
        if not self.keeps:
            return
        entry = {
            "step": work.step.number,
            "epoch": work.step.epoch,
            "samples": [int(sample) for sample in work.step.samples],
            "supervised": work.supervised,
            "tokens": work.tokens,
            "world_size": world_size,
            "waited": round(waited, 4),
            **asdict(result),
        }
        self.lines.append(json.dumps(entry))

    def text(self) -> str:
        return "".join(line + "\n" for line in self.lines)


def _resume(engine: Engine, ledger: _Ledger) -> int:
    """Go on from the run's last checkpoint, if there is one; returns the next step."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        step = engine.load(Path(folder))
        if ledger.keeps:
            ledger.lines = (Path(folder) / LEDGER).read_text().splitlines()
    logger.info("resumed at step %d", step)
    return step


class _Saver:
    """Writes a checkpoint when it is due, all ranks at the same step; Ray uploads it while training goes on."""

    def __init__(self, training: Training) -> None:
        self._every = training.checkpoints.every_minutes * 60
        self._last = time.monotonic()

    def due(self) -> bool:
        """Rank 0 decides by its clock, so that all ranks agree."""
        late = time.monotonic() - self._last >= self._every
        if torch.distributed.get_world_size() == 1:
            return late
        verdict = torch.tensor([int(late)], device=ray.train.torch.get_device())
        torch.distributed.broadcast(verdict, src=0)
        return bool(verdict.item())

    def save(self, engine: Engine, ledger: _Ledger, cursor: int) -> None:
        folder = Path(tempfile.mkdtemp(prefix="raylava-checkpoint-"))  # Ray removes it once it is uploaded
        engine.save(folder, cursor)
        if ledger.keeps:
            (folder / LEDGER).write_text(ledger.text())
        ray.train.report(
            {"step": cursor},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"step-{cursor:08d}",
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        )
        self._last = time.monotonic()


def _write_result(job: TrainJob, engine: Engine, ledger: _Ledger) -> None:
    """The stage's product, written by rank 0 to where the artifact will be."""
    weights = engine.weights(only_trained=job.stage == "pretrain")
    if weights is None:
        return
    folder = Path(tempfile.mkdtemp(prefix="raylava-result-"))
    try:
        if job.stage == "pretrain":
            _write_connector(weights, folder)
        else:
            publish(
                engine.llava, weights, load_tokenizer(job.model.language), job.vision, job.language, job.fit, folder
            )
        (folder / LEDGER).write_text(ledger.text())
        place(job.output).upload_folder(folder)
    finally:
        shutil.rmtree(folder)


def _write_connector(weights: dict[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in weights.items()}, folder / CONNECTOR_FILE)
