"""The training loop of one rank: data loader → engine → step log, metrics, checkpoints. Independent of Ray.

Every rank runs the same number of steps and packs. Rank 0 writes the step log and reports metrics.
"""

import json
import logging
import shutil
import tempfile
import time
from pathlib import Path

import torch

from raylava.artifacts import publish_folder
from raylava.compat.torch import is_out_of_memory
from raylava.corpus.block_cache import open_blocks
from raylava.errors import RunError, first_line
from raylava.models.connector import (
    CONNECTOR,
    CONNECTOR_FILE,
    TRAINED_CONNECTOR,
    load_connector,
    running_feature_factor,
    save_connector,
)
from raylava.models.export import export_model
from raylava.models.llava import DTYPES, build_llava
from raylava.storage import storage_path
from raylava.train.auto import AutoResolver
from raylava.train.backend import COMPUTING, LOADING, PUBLISHING, SAVING, STARTING, CheckpointRef, TrainBackend
from raylava.train.batch_plan import worst_case_packs
from raylava.train.checkpoints import CheckpointManager, checkpoint_weights, read_checkpoint_meta
from raylava.train.data_loader import PackedDataLoader, StepBatch
from raylava.train.engine import DryRunOutOfMemoryError, Engine, StepResult
from raylava.train.metrics import MetricsLogger, ThroughputMeter
from raylava.train.replay import dump_step
from raylava.train.spec import TrainSpec, build_batch_plan, build_collator
from raylava.train.step_log import FINAL_STATE, MECHANISMS, STEP_LOG, StepLog

logger = logging.getLogger(__name__)


class Trainer:
    """Runs one training stage on one rank. All ranks call the same methods in the same order."""

    def __init__(self, spec: TrainSpec, backend: TrainBackend, cache_bytes: float) -> None:
        self._spec, self._backend = spec, backend
        backend.heartbeat(0, STARTING)
        self._blocks = open_blocks(storage_path(spec.blocks), cache_bytes)
        self._plan = build_batch_plan(spec.training, spec.seed, self._blocks)
        self._collator = build_collator(spec)
        training = spec.training
        self._llava = build_llava(spec.model, spec.seed, DTYPES[training.precision], training.attn_implementation)
        if spec.connector:
            load_connector(self._llava, spec.connector)
        self._shape = spec.model.shape(self._llava.config.text_config.vocab_size)
        self._step_log = StepLog()
        self._checkpoints = CheckpointManager(spec, self._plan.steps, backend)
        self._consecutive_skips = 0
        self._mechanisms: dict[str, str] = {}

    def run(self) -> None:
        """Train from the latest checkpoint, or from the start, and write the result."""
        with self._backend.last_checkpoint() as checkpoint:
            if checkpoint and read_checkpoint_meta(storage_path(checkpoint.folder)).step >= self._plan.steps:
                checkpoint = None  # the state of another run that was, in steps, not shorter than this one
            self._build_engine(checkpoint)
            dry_run = self._memory_dry_run()
            self._engine.restore()
            self._resume(checkpoint)
        first_step = self._engine.first_step
        loader = self._build_loader(first_step)
        if self._backend.rank == 0:
            self._announce_mechanisms(loader, dry_run)
        metrics_logger = self._build_metrics_logger(first_step) if self._backend.rank == 0 else None
        self._train(loader, metrics_logger)
        if metrics_logger is not None:
            metrics_logger.close()
        if self._spec.keep_final_state:
            self._checkpoints.keep_final(self._engine, self._step_log, storage_path(self._spec.output) / FINAL_STATE)
        self._backend.heartbeat(self._plan.steps, PUBLISHING)
        self._write_result()

    def _build_engine(self, checkpoint: CheckpointRef | None) -> None:
        """Resolve the `auto` settings, and build the engine, for the checkpoint's state, and the throughput meter."""
        spec, backend = self._spec, self._backend
        resolver = AutoResolver(spec.stage, self._shape, self._blocks.lengths, self._plan, backend.device)
        saved_zero_stage = read_checkpoint_meta(storage_path(checkpoint.folder)).zero_stage if checkpoint else None
        self._resolved = resolved = resolver.resolve_auto(spec.training, saved_zero_stage, spec.rejected_configs)
        self._max_tokens_per_pack = resolved.candidate.config.max_tokens_per_pack
        folder = checkpoint.folder if checkpoint else None
        try:
            self._engine = Engine(self._llava, spec.stage, resolved.training, self._plan.steps, backend.device, folder)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._reject_config()
            problem = f"out of memory for the model and its optimizer: {resolved.advice} ({first_line(error)[:120]})"
            raise DryRunOutOfMemoryError(problem) from error
        self._meter = ThroughputMeter(
            self._shape,
            self._blocks.lengths,
            resolved.training,
            language=spec.stage == "finetune",
            device=backend.device,
            world_size=backend.world_size,
        )

    def _resume(self, checkpoint: CheckpointRef | None) -> None:
        """Continue the checkpoint's step log and the count of checkpoints, if there is a checkpoint."""
        if checkpoint is None:
            return
        if self._backend.rank == 0:
            self._step_log = StepLog((checkpoint.folder / STEP_LOG).read_text())
        self._checkpoints.resume_from(checkpoint.uri, self._engine.first_step)
        logger.info("resumed at step %d", self._engine.first_step)

    def _memory_dry_run(self) -> str:
        """Compute a step of the worst-case packs, so that a run that does not fit fails before its first step.

        Returns a description of the packs. Raises DryRunOutOfMemoryError, after which a backend that can start the
        workers again does so, if the recipe allows a configuration that needs less memory.
        """
        global_batch_size = self._spec.training.global_batch_size
        packs = worst_case_packs(self._blocks.lengths, self._max_tokens_per_pack, global_batch_size)
        tensors = [self._collator.collate([self._blocks[number] for number in pack]) for pack in packs]
        try:
            self._engine.memory_dry_run(tensors, self._resolved.advice)
        except DryRunOutOfMemoryError:
            self._reject_config()
            raise
        return f"{len(tensors)} packs of up to {max(pack.input_ids.shape[1] for pack in tensors)} tokens"

    def _reject_config(self) -> None:
        if self._resolved.has_smaller:
            self._backend.reject(self._resolved.candidate.config)

    def _build_loader(self, first_step: int) -> PackedDataLoader:
        return PackedDataLoader(
            self._blocks,
            self._plan,
            self._collator,
            self._backend.rank,
            self._backend.world_size,
            self._max_tokens_per_pack,
            first_step,
            prepare=self._engine.prepare,
            # Beside a GPU the worker's cores are free to decode; on a CPU they compute.
            threads=torch.get_num_threads() if self._backend.device.type == "cuda" else 1,
        )

    def _announce_mechanisms(self, loader: PackedDataLoader, dry_run: str) -> None:
        """Report what is in force, before the first step; `_write_result` adds it to the artifact."""
        self._mechanisms = {
            **self._engine.mechanisms(),
            "batches": self._plan.description(),
            "packing": loader.packing(),
            "data loader threads": loader.threads(),
            "memory dry run": dry_run,
            "checkpoints": self._checkpoints.description(),
        }
        self._backend.announce([f"{name}: {description}" for name, description in self._mechanisms.items()])

    def _build_metrics_logger(self, first_step: int) -> MetricsLogger:
        spec = self._spec
        settings = spec.training.fingerprint_fields() | {"stage": spec.stage, "world_size": self._backend.world_size}
        return MetricsLogger(storage_path(spec.output), first_step, spec.tracking, settings)

    def _train(self, loader: PackedDataLoader, metrics_logger: MetricsLogger | None) -> None:
        backend = self._backend
        checkpoint_stall_s = 0.0
        backend.heartbeat(self._engine.first_step, LOADING)
        waiting_since = time.monotonic()
        for batch in loader:
            data_wait_s = time.monotonic() - waiting_since
            backend.heartbeat(batch.step.number, COMPUTING)
            request = self._checkpoints.request(batch.step.number + 1)
            result = self._engine.step(batch.step.number, batch.packs, request)
            if metrics_logger is not None:
                self._step_log.add(batch, result, backend.world_size)
                metrics = self._meter.measure(batch, result, data_wait_s, checkpoint_stall_s)
                metrics_logger.add(metrics)
                backend.report(metrics, self._plan.steps)
            self._check_finite(batch, result)
            checkpoint_stall_s = self._save_if_due(batch.step.number + 1, result)
            backend.heartbeat(batch.step.number + 1, LOADING)
            waiting_since = time.monotonic()

    def _write_result(self) -> None:
        """Write the stage's result to the artifact's folder. Called by all ranks; rank 0 writes."""
        spec = self._spec
        weights = self._engine.weights(only_trained=spec.stage == "pretrain")
        exported = "after the last step"
        if spec.training.checkpoint.keep_best:
            exported = self._select_best(weights)
        if weights is None:
            return
        folder = Path(tempfile.mkdtemp(prefix="raylava-result-"))
        try:
            self._write_weights(weights, folder)
            (folder / STEP_LOG).write_text(self._step_log.text())
            (folder / MECHANISMS).write_text(json.dumps(self._mechanisms | {"exported weights": exported}, indent=2))
            publish_folder(folder, storage_path(spec.output))
        finally:
            shutil.rmtree(folder)

    def _write_weights(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write the connector after pretraining; after finetuning the model, and the connector as it was trained."""
        spec, llava = self._spec, self._engine.llava
        factor = running_feature_factor(llava)
        if spec.stage == "pretrain":
            save_connector(weights, factor, folder / CONNECTOR_FILE)
            return
        export_model(llava, weights, spec.model, spec.image_aspect, folder)
        connector = {name: value for name, value in weights.items() if name.startswith(CONNECTOR)}
        (folder / TRAINED_CONNECTOR).mkdir()
        save_connector(connector, factor, folder / TRAINED_CONNECTOR / CONNECTOR_FILE)

    def _select_best(self, weights: dict[str, torch.Tensor] | None) -> str:
        """Replace the weights by those of the best checkpoint if its loss is lower than that of the last steps.

        Returns a description of the state that is exported. Called by all ranks; only rank 0 has weights.
        """
        last_loss = self._checkpoints.mean_loss()
        with self._backend.best_checkpoint() as best:
            if weights is None or best is None or last_loss <= best[1]:
                return f"after the last step, mean loss {last_loss:.4g}" + (", the lowest" if best else "")
            checkpoint, loss = best
            for name, value in checkpoint_weights(checkpoint.folder).items():
                if name in weights:  # at stage 3 tied weights come under both of their names
                    weights[name] = value.to(weights[name].dtype)
            step = read_checkpoint_meta(storage_path(checkpoint.folder)).step
            return f"before step {step}, mean loss {loss:.4g}, the lowest"

    def _save_if_due(self, next_step: int, result: StepResult) -> float:
        """Save a checkpoint if one is due; return the seconds that training stood still."""
        self._checkpoints.record_loss(result)
        if not self._checkpoints.should_save(result.request):
            return 0.0
        self._backend.heartbeat(next_step, SAVING)
        return self._checkpoints.save(self._engine, self._step_log, next_step)

    def _check_finite(self, batch: StepBatch, result: StepResult) -> None:
        """End the run after too many consecutive skipped steps. Raises RunError."""
        self._consecutive_skips = self._consecutive_skips + 1 if result.skipped else 0
        if result.skipped and self._backend.rank == 0:
            logger.warning("step %d was skipped: its loss or a gradient is not finite", batch.step.number)
        if self._consecutive_skips < self._spec.training.max_consecutive_skips:
            return
        sample_ids = [self._blocks[number].sample_id for number in batch.step.samples]
        folder = dump_step(self._spec, self._engine, batch.step, sample_ids)
        raise RunError(
            f"{self._consecutive_skips} consecutive steps had a non-finite loss or gradient, the last is step "
            f"{batch.step.number}; inspect its samples with `raylava replay {folder}`, then lower lr or fix them"
        )
