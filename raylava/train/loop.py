"""One rank's way through the plan: feed → engine → ledger, figures, checkpoints. Knows nothing of Ray.

Every rank runs the same number of steps and packs; rank 0 keeps the ledger and tells how far it is.
"""

import logging
import shutil
import tempfile
import time
from pathlib import Path

import torch

from raylava.corpus.cache import cached_blocks
from raylava.cost.shapes import shape_of
from raylava.errors import RunError
from raylava.model.backbones import load_tokenizer
from raylava.model.llava import CONNECTOR_FILE, assemble, load_connector
from raylava.model.publish import publish
from raylava.storage import place
from raylava.train.engine import DTYPES, Engine, StepResult, read_cursor
from raylava.train.feed import Feed, StepWork
from raylava.train.figures import Meter
from raylava.train.host import COMPUTING, LOADING, SAVING, Host, KeptCheckpoint
from raylava.train.job import TrainJob, epoch_plan, layout_of
from raylava.train.ledger import LEDGER, Ledger
from raylava.train.plan import largest_packs
from raylava.train.replay import dump
from raylava.train.saver import Saver
from raylava.train.settle import Settler
from raylava.train.telemetry import Telemetry

logger = logging.getLogger(__name__)


class Loop:
    """One rank's run of one training stage. All ranks take every turn together."""

    def __init__(self, job: TrainJob, host: Host, cache_bytes: float) -> None:
        self._job, self._host = job, host
        self._blocks = cached_blocks(place(job.blocks), cache_bytes)
        self._plan = epoch_plan(job, self._blocks)
        self._layout = layout_of(job)
        training = job.training
        llava = assemble(job.model, job.vision, job.seed, DTYPES[training.precision], training.attention)
        if job.connector:
            load_connector(llava, job.connector)
        self._llava, self._shape = llava, shape_of(llava.config)
        self._ledger = Ledger()
        self._saver = Saver(job, self._plan.steps, host)
        self._skipped = 0

    def run(self) -> None:
        """From the last checkpoint, or the start, to the result."""
        with self._host.last_checkpoint() as kept:
            self._settle(kept)
            first = self._resume(kept)
        if first < self._plan.steps:
            self._rehearse()
        telemetry = self._telemetry(first) if self._host.rank == 0 else None
        self._train(first, telemetry)
        if telemetry is not None:
            telemetry.close()
        _write_result(self._job, self._engine, self._ledger)

    def _settle(self, kept: KeptCheckpoint | None) -> None:
        """Choose what the recipe leaves open, and build the engine with it."""
        job, host = self._job, self._host
        settler = Settler(job.stage, self._shape, self._blocks.lengths, self._plan, host.device)
        settled = settler.settle(job.training, read_cursor(place(kept.folder)).zero_stage if kept else None)
        self._training, self._advice = settled.training, settled.advice
        self._pack_tokens = settled.option.way.pack_tokens
        self._engine = Engine(self._llava, job.stage, self._training, self._plan.steps, host.device)

    def _resume(self, kept: KeptCheckpoint | None) -> int:
        """The next step."""
        if kept is None:
            return 0
        step = self._engine.load(kept.folder)
        if self._host.rank == 0:
            self._ledger = Ledger((kept.folder / LEDGER).read_text())
        self._saver.resumed(kept.uri, step)
        logger.info("resumed at step %d", step)
        return step

    def _rehearse(self) -> None:
        """The largest packs once, so that memory gives out now or never."""
        packs = largest_packs(self._blocks.lengths, self._pack_tokens, self._job.training.global_batch)
        tensors = [self._layout.tensors([self._blocks[number] for number in pack]) for pack in packs]
        self._engine.rehearse(tensors, self._advice)

    def _telemetry(self, first: int) -> Telemetry:
        job, host = self._job, self._host
        language = job.stage == "finetune"
        meter = Meter(self._shape, self._blocks.lengths, self._training, language, host.device, host.world_size)
        settings = job.training.content() | {"stage": job.stage, "world_size": host.world_size}
        return Telemetry(place(job.output), first, meter, job.tracking, settings)

    def _train(self, first: int, telemetry: Telemetry | None) -> None:
        host = self._host
        feed = Feed(self._blocks, self._plan, self._layout, host.rank, host.world_size, self._pack_tokens, first)
        saving = 0.0
        host.beat(first, LOADING)
        asked = time.monotonic()
        for work in feed:
            waited = time.monotonic() - asked
            host.beat(work.step.number, COMPUTING)
            result = self._engine.step(work.step.number, work.packs, work.supervised)
            if telemetry is not None:
                self._ledger.add(work, result, host.world_size)
                host.show(telemetry.add(work, result, waited, saving), self._plan.steps)
            self._check_finite(work, result)
            saving = self._save_if_due(work.step.number + 1, result)
            host.beat(work.step.number + 1, LOADING)
            asked = time.monotonic()

    def _save_if_due(self, cursor: int, result: StepResult) -> float:
        """The seconds that it took."""
        self._saver.saw(result)
        if not self._saver.due(cursor):
            return 0.0
        self._host.beat(cursor, SAVING)
        return self._saver.save(self._engine, self._ledger, cursor)

    def _check_finite(self, work: StepWork, result: StepResult) -> None:
        self._skipped = self._skipped + 1 if result.skipped else 0
        if result.skipped and self._host.rank == 0:
            logger.warning("step %d was skipped: its loss or a gradient is not finite", work.step.number)
        if self._skipped < self._job.training.stop_after_skipped:
            return
        where = dump(self._job, self._engine, work.step, [self._blocks[n].sample_id for n in work.step.samples])
        raise RunError(
            f"{self._skipped} steps in a row were not finite, the last is step {work.step.number}; "
            f"look at its samples with `raylava replay {where}`, then lower lr or mend them"
        )


def _write_result(job: TrainJob, engine: Engine, ledger: Ledger) -> None:
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
