"""One worker's loop: feed → engine → report. The only room, with trainer.py, where training meets Ray.

Every rank runs the same number of steps and packs; rank 0 keeps the ledger and tells the driver how far it is.
"""

import hashlib
import json
import logging
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode

from raylava.corpus.blocks import Blocks
from raylava.corpus.cache import cached_blocks
from raylava.errors import RunError
from raylava.model.backbones import load_tokenizer
from raylava.model.llava import CONNECTOR_FILE, assemble, load_connector
from raylava.model.publish import publish
from raylava.storage import place
from raylava.train.engine import DTYPES, Engine, StepResult
from raylava.train.feed import Feed, StepWork
from raylava.train.flops import ModelSize, model_size, peak_flops, step_flops
from raylava.train.job import TrainJob, epoch_plan, layout_of
from raylava.train.plan import EpochPlan, largest_packs
from raylava.train.replay import dump
from raylava.train.telemetry import StepFigures, Telemetry, memory_gb
from raylava.train.upload import upload
from raylava.train.watch import COMPUTING, LOADING, SAVING

logger = logging.getLogger(__name__)

LEDGER = "steps.jsonl"
_GO_ON, _SAVE, _ASK = range(3)  # what rank 0 decides after a step


CHECKPOINTS = "checkpoints"  # the Ray Train run's folder within the draft; removed once the result stands
_ASK_SECONDS = 5.0  # how often ranks ask whether a node is about to go


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's loop function. `config` holds the TrainJob, the watch of its progress, CPU threads, cache bytes."""
    job: TrainJob = config["job"]
    torch.set_num_threads(config["threads"])
    blocks = cached_blocks(place(job.blocks), config["cache_bytes"])
    plan = epoch_plan(job, blocks)
    engine, size = _engine(job, plan, ray.train.torch.get_device())
    worker = _Worker(job, plan, blocks, engine, config["watch"])
    first = worker.resume()
    if first < plan.steps:
        worker.rehearse()
    worker.train(first, size)


class _Worker:
    """One rank's way through the plan. All ranks take every turn together."""

    def __init__(self, job: TrainJob, plan: EpochPlan, blocks: Blocks, engine: Engine, watch: Any) -> None:
        context = ray.train.get_context()
        self._job, self._plan, self._blocks, self._engine, self._watch = job, plan, blocks, engine, watch
        self._rank, self._world_size = context.get_world_rank(), context.get_world_size()
        self._layout = layout_of(job)
        self._ledger = Ledger(self._rank == 0)
        self._saver = _Saver(job, plan.steps)
        self._skipped = 0

    def resume(self) -> int:
        """Go on from the run's last checkpoint, if there is one; returns the next step."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            step = self._engine.load(Path(folder))
            if self._ledger.keeps:
                self._ledger.lines = (Path(folder) / LEDGER).read_text().splitlines()
        self._saver.resumed(checkpoint.path)
        logger.info("resumed at step %d", step)
        return step

    def rehearse(self) -> None:
        """The largest packs once, so that memory gives out now or never."""
        lengths = self._blocks.lengths
        packs = largest_packs(lengths.length, lengths.images, self._job.training.pack_tokens)
        self._engine.rehearse([self._layout.tensors([self._blocks[number] for number in pack]) for pack in packs])

    def train(self, first: int, size: ModelSize) -> None:
        """All steps from `first` on, then the result."""
        feed = Feed(
            self._blocks,
            self._plan,
            self._layout,
            self._rank,
            self._world_size,
            self._job.training.pack_tokens,
            first,
        )
        meter = _Meter(self._job, self._blocks, size) if self._rank == 0 else None
        telemetry = Telemetry(place(self._job.output), first) if self._rank == 0 else None
        self._beat(first, LOADING)
        waiting_since = time.monotonic()
        for work in feed:
            waited = time.monotonic() - waiting_since
            number = work.step.number
            self._beat(number, COMPUTING)
            result = self._engine.step(number, work.packs, work.supervised)
            self._ledger.add(work, result, self._world_size)
            if meter is not None and telemetry is not None:
                figures = meter.figures(work, result, waited)
                telemetry.add(figures)
                self._show(figures)
            self._check_finite(work, result)
            self._keep(number + 1, result)
            self._beat(number + 1, LOADING)
            waiting_since = time.monotonic()
        if telemetry is not None:
            telemetry.close()
        _write_result(self._job, self._engine, self._ledger)

    def _beat(self, step: int, doing: str) -> None:
        self._watch.beat.remote(self._rank, step, doing)

    def _show(self, figures: StepFigures) -> None:
        shown = {"loss": figures.loss, "tok/s": figures.tokens_per_second, "wait": figures.waiting_share}
        if figures.mfu is not None:
            shown["mfu"] = figures.mfu
        self._watch.update.remote(figures.step + 1, self._plan.steps, **shown)

    def _keep(self, cursor: int, result: StepResult) -> None:
        self._saver.saw(result)
        if cursor < self._plan.steps and self._saver.due(cursor):
            self._beat(cursor, SAVING)
            self._saver.save(self._engine, self._ledger, cursor)

    def _check_finite(self, work: StepWork, result: StepResult) -> None:
        self._skipped = self._skipped + 1 if result.skipped else 0
        if result.skipped and self._rank == 0:
            logger.warning("step %d was skipped: its loss or a gradient is not finite", work.step.number)
        if self._skipped < self._job.training.stop_after_skipped:
            return
        where = dump(self._job, self._engine, work.step, [self._blocks[n].sample_id for n in work.step.samples])
        raise RunError(
            f"{self._skipped} steps in a row were not finite, the last is step {work.step.number}; "
            f"look at its samples with `raylava replay {where}`, then lower lr or mend them"
        )


class _Meter:
    """Turns a step's outcome into figures a person watches, on rank 0."""

    def __init__(self, job: TrainJob, blocks: Blocks, size: ModelSize) -> None:
        context = ray.train.get_context()
        self._device = ray.train.torch.get_device()
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        peak = peak_flops(name)
        self._peak = peak and peak * context.get_world_size()
        self._lengths, self._size = blocks.lengths, size
        self._trains = {"language": job.stage == "finetune", "vision": job.training.vision_lr is not None}

    def figures(self, work: StepWork, result: StepResult, waited: float) -> StepFigures:
        samples = work.step.samples
        whole = result.seconds + waited
        lengths = [int(length) for length in self._lengths.length[samples]]
        images = int(self._lengths.images[samples].sum())
        flops = step_flops(self._size, lengths, images, work.supervised, **self._trains)
        return StepFigures(
            step=work.step.number,
            loss=result.loss,
            lr=result.lr,
            gradient_norm=result.gradient_norm,
            seconds=result.seconds,
            waiting_share=waited / whole,
            samples_per_second=len(samples) / whole,
            tokens_per_second=work.tokens / whole,
            supervised_tokens_per_second=work.supervised / whole,
            mfu=self._peak and flops / whole / self._peak,
            memory_gb=memory_gb(self._device),
            skipped=result.skipped,
        )


def _engine(job: TrainJob, plan: EpochPlan, device: torch.device) -> tuple[Engine, ModelSize]:
    training = job.training
    llava = assemble(job.model, job.vision, job.seed, DTYPES[training.precision], training.attention)
    if job.connector:
        load_connector(llava, job.connector)
    size = model_size(llava)
    return Engine(llava, job.stage, training, plan.steps, device), size


class Ledger:
    """steps.jsonl, kept by rank 0: what was done in each step, and the proof that a resumed run did the same."""

    def __init__(self, keeps: bool) -> None:
        self.keeps = keeps
        self.lines: list[str] = []

    def add(self, work: StepWork, result: StepResult, world_size: int) -> None:
        """One step. `samples_sha256` is of the samples' numbers in the plan's order, as little-endian int64."""
        if not self.keeps:
            return
        samples = np.ascontiguousarray(work.step.samples, dtype="<i8")
        entry = {
            "step": work.step.number,
            "epoch": work.step.epoch,
            "samples": len(samples),
            "samples_sha256": hashlib.sha256(samples.tobytes()).hexdigest()[:16],
            "loss": result.loss if math.isfinite(result.loss) else None,
            "skipped": result.skipped,
            "tokens": work.tokens,
            "supervised": work.supervised,
            "world_size": world_size,
            "time": round(time.time(), 3),
        }
        self.lines.append(json.dumps(entry))

    def text(self) -> str:
        return "".join(line + "\n" for line in self.lines)


class _Saver:
    """Writes checkpoints when due, all ranks at the same step; they are uploaded while training goes on."""

    def __init__(self, job: TrainJob, steps: int) -> None:
        self._settings, self._steps = job.training.checkpoints, steps
        self._runs = place(job.output) / CHECKPOINTS
        self._last_time, self._last_step = time.monotonic(), 0
        self._asked = time.monotonic()
        self._warned = False  # of a node about to go
        self._saved = 0
        self._losses: list[float] = []
        self._last_good = "none"

    def resumed(self, checkpoint: str) -> None:
        """The run goes on from this one."""
        self._last_good, self._saved = checkpoint, 1

    def saw(self, result: StepResult) -> None:
        """A step's loss, for the mean by which the best checkpoints are kept."""
        if not result.skipped:
            self._losses.append(result.loss)

    def due(self, cursor: int) -> bool:
        """Whether to save before step `cursor`. Rank 0 decides by its clock, so that all ranks agree."""
        answer = self._agreed(self._verdict(cursor))
        if answer != _ASK:
            return answer == _SAVE
        self._asked = time.monotonic()
        return self._node_is_going()

    def _verdict(self, cursor: int) -> int:
        settings = self._settings
        late = time.monotonic() - self._last_time >= settings.every_minutes * 60
        if settings.every_steps is not None and cursor - self._last_step >= settings.every_steps:
            late = True
        if not self._saved and 2 * cursor >= self._steps:
            late = True
        if late:
            return _SAVE
        return _ASK if time.monotonic() - self._asked >= _ASK_SECONDS else _GO_ON

    def _agreed(self, verdict: int) -> int:
        if torch.distributed.get_world_size() == 1:
            return verdict
        shared = torch.tensor([verdict], device=ray.train.torch.get_device())
        torch.distributed.broadcast(shared, src=0)
        return int(shared.item())

    def _node_is_going(self) -> bool:
        """A spot notice for a node of this run, the first time it is heard; Ray starts anew once the node is gone."""
        info = ray.train.get_preemption_info()
        if info is None or self._warned:
            return False
        self._warned = True
        logger.warning("a node of this run is about to go: saving at once")
        return True

    def save(self, engine: Engine, ledger: Ledger, cursor: int) -> None:
        folder = Path(tempfile.mkdtemp(prefix="raylava-checkpoint-"))  # Ray removes it once it is uploaded
        engine.save(folder, cursor)
        if ledger.keeps:
            (folder / LEDGER).write_text(ledger.text())
        name = f"step-{cursor:08d}"

        def uploaded(local: Checkpoint, _: str) -> Checkpoint:
            engine.written()
            target = self._runs / name
            upload(Path(local.path), target, self._settings.retry_minutes * 60, lambda: self._last_good)
            self._last_good = str(target)
            return Checkpoint(path=target.path, filesystem=target.filesystem)

        loss = sum(self._losses) / len(self._losses) if self._losses else math.inf
        ray.train.report(
            {"step": cursor, "loss": loss},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=uploaded,
        )
        self._last_time, self._last_step, self._losses = time.monotonic(), cursor, []
        self._saved += 1


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
