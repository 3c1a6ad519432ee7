"""One rank's way through the plan: feed → engine → ledger, metrics, checkpoints. Knows nothing of Ray.

Every rank runs the same number of steps and packs; rank 0 keeps the ledger and tells how far it is.
"""

import logging
import shutil
import tempfile
import time
from pathlib import Path

import torch

from raylava.corpus.block_cache import cached_blocks
from raylava.errors import RunError
from raylava.models.export import publish
from raylava.models.llava import CONNECTOR_FILE, build_llava, load_connector
from raylava.models.registry import load_tokenizer
from raylava.perf.shapes import shape_of
from raylava.storage import storage_path
from raylava.train.auto import AutoResolver
from raylava.train.backend import COMPUTING, LOADING, SAVING, CheckpointRef, TrainBackend
from raylava.train.batch_plan import worst_case_packs
from raylava.train.checkpoints import CheckpointManager
from raylava.train.data_loader import PackedDataLoader, StepBatch
from raylava.train.engine import DTYPES, Engine, StepResult, read_checkpoint_meta
from raylava.train.metrics import ThroughputMeter
from raylava.train.metrics_logger import MetricsLogger
from raylava.train.replay import dump
from raylava.train.spec import TrainSpec, epoch_plan, pack_collator
from raylava.train.step_log import STEP_LOG, StepLog

logger = logging.getLogger(__name__)


class Trainer:
    """One rank's run of one training stage. All ranks take every turn together."""

    def __init__(self, spec: TrainSpec, backend: TrainBackend, cache_bytes: float) -> None:
        self._spec, self._backend = spec, backend
        self._blocks = cached_blocks(storage_path(spec.blocks), cache_bytes)
        self._plan = epoch_plan(spec, self._blocks)
        self._layout = pack_collator(spec)
        training = spec.training
        llava = build_llava(
            spec.model, spec.vision, spec.seed, DTYPES[training.precision], training.attn_implementation
        )
        if spec.connector:
            load_connector(llava, spec.connector)
        self._llava, self._shape = llava, shape_of(llava.config)
        self._ledger = StepLog()
        self._saver = CheckpointManager(spec, self._plan.steps, backend)
        self._skipped = 0

    def run(self) -> None:
        """From the last checkpoint, or the start, to the result."""
        with self._backend.last_checkpoint() as kept:
            self._resolve_auto(kept)
            first = self._resume(kept)
        if first < self._plan.steps:
            self._memory_dry_run()
        telemetry = self._telemetry(first) if self._backend.rank == 0 else None
        self._train(first, telemetry)
        if telemetry is not None:
            telemetry.close()
        _write_result(self._spec, self._engine, self._ledger)

    def _resolve_auto(self, kept: CheckpointRef | None) -> None:
        """Choose what the recipe leaves open, and build the engine with it."""
        spec, backend = self._spec, self._backend
        resolver = AutoResolver(spec.stage, self._shape, self._blocks.lengths, self._plan, backend.device)
        resolved = resolver.resolve_auto(
            spec.training, read_checkpoint_meta(storage_path(kept.folder)).zero_stage if kept else None
        )
        self._training, self._advice = resolved.training, resolved.advice
        self._pack_tokens = resolved.option.way.max_tokens_per_pack
        self._engine = Engine(self._llava, spec.stage, self._training, self._plan.steps, backend.device)

    def _resume(self, kept: CheckpointRef | None) -> int:
        """The next step."""
        if kept is None:
            return 0
        step = self._engine.load(kept.folder)
        if self._backend.rank == 0:
            self._ledger = StepLog((kept.folder / STEP_LOG).read_text())
        self._saver.resumed(kept.uri, step)
        logger.info("resumed at step %d", step)
        return step

    def _memory_dry_run(self) -> None:
        """The largest packs once, so that memory gives out now or never."""
        packs = worst_case_packs(self._blocks.lengths, self._pack_tokens, self._spec.training.global_batch_size)
        tensors = [self._layout.tensors([self._blocks[number] for number in pack]) for pack in packs]
        self._engine.memory_dry_run(tensors, self._advice)

    def _telemetry(self, first: int) -> MetricsLogger:
        spec, backend = self._spec, self._backend
        language = spec.stage == "finetune"
        meter = ThroughputMeter(
            self._shape, self._blocks.lengths, self._training, language, backend.device, backend.world_size
        )
        settings = spec.training.fingerprint_fields() | {"stage": spec.stage, "world_size": backend.world_size}
        return MetricsLogger(storage_path(spec.output), first, meter, spec.tracking, settings)

    def _train(self, first: int, telemetry: MetricsLogger | None) -> None:
        backend = self._backend
        feed = PackedDataLoader(
            self._blocks, self._plan, self._layout, backend.rank, backend.world_size, self._pack_tokens, first
        )
        saving = 0.0
        backend.heartbeat(first, LOADING)
        asked = time.monotonic()
        for work in feed:
            waited = time.monotonic() - asked
            backend.heartbeat(work.step.number, COMPUTING)
            result = self._engine.step(work.step.number, work.packs, work.loss_tokens)
            if telemetry is not None:
                self._ledger.add(work, result, backend.world_size)
                backend.report(telemetry.add(work, result, waited, saving), self._plan.steps)
            self._check_finite(work, result)
            saving = self._save_if_due(work.step.number + 1, result)
            backend.heartbeat(work.step.number + 1, LOADING)
            asked = time.monotonic()

    def _save_if_due(self, cursor: int, result: StepResult) -> float:
        """The seconds that it took."""
        self._saver.record_loss(result)
        if not self._saver.should_save(cursor):
            return 0.0
        self._backend.heartbeat(cursor, SAVING)
        return self._saver.save(self._engine, self._ledger, cursor)

    def _check_finite(self, work: StepBatch, result: StepResult) -> None:
        self._skipped = self._skipped + 1 if result.skipped else 0
        if result.skipped and self._backend.rank == 0:
            logger.warning("step %d was skipped: its loss or a gradient is not finite", work.step.number)
        if self._skipped < self._spec.training.max_consecutive_skips:
            return
        where = dump(self._spec, self._engine, work.step, [self._blocks[n].sample_id for n in work.step.samples])
        raise RunError(
            f"{self._skipped} steps in a row were not finite, the last is step {work.step.number}; "
            f"look at its samples with `raylava replay {where}`, then lower lr or mend them"
        )


def _write_result(spec: TrainSpec, engine: Engine, ledger: StepLog) -> None:
    """The stage's product, written by rank 0 to where the artifact will be."""
    weights = engine.weights(only_trained=spec.stage == "pretrain")
    if weights is None:
        return
    folder = Path(tempfile.mkdtemp(prefix="raylava-result-"))
    try:
        if spec.stage == "pretrain":
            _write_connector(weights, folder)
        else:
            publish(
                engine.llava,
                weights,
                load_tokenizer(spec.model.language),
                spec.vision,
                spec.language,
                spec.image_aspect,
                folder,
            )
        (folder / STEP_LOG).write_text(ledger.text())
        storage_path(spec.output).upload_folder(folder)
    finally:
        shutil.rmtree(folder)


def _write_connector(weights: dict[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in weights.items()}, folder / CONNECTOR_FILE)
