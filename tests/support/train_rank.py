"""One rank of tests/ray/train/test_engine.py: an engine without Ray that trains a few steps in each of several runs.

The only argument is JSON: rank, world_size, rendezvous, language, vision, blocks, and `runs`, which maps names to
training settings and the options of a run:

    stage           pretrain or finetune (the default)
    epochs          of six steps; 1 by default
    checkpoint      a folder that is written after step 3
    resume          a checkpoint folder to resume from
    memory_dry_run  compute a pack and an update at rate 0 before the first step
    poison          a step in which the last rank's images are NaN
    moments         a file for Adam's first moments after the first step
    count_attention count the calls of attention in each step
    mixed           the first of three ranks gets text-only samples, the second samples with images, the third both
    starve          only the memory dry run of a huge pack, with little memory; must be the last run

Rank 0 prints one JSON line per step.
"""

import hashlib
import itertools
import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state
from safetensors.torch import save_file

from raylava.config.recipe import Language, Model, Training, Vision
from raylava.corpus.blocks import Blocks, Sample
from raylava.errors import RunError
from raylava.models.llava import DTYPES, build_llava
from raylava.models.packs import HostPack
from raylava.models.registry import ResolvedModel, load_tokenizer, resolve_model
from raylava.models.templates import IMAGE_TOKEN
from raylava.storage import storage_path
from raylava.train.auto import AutoResolver, ResolvedTraining
from raylava.train.batch_plan import BatchPlan
from raylava.train.checkpoints import read_checkpoint_meta
from raylava.train.data_loader import PackCollator, PackedDataLoader, StepBatch
from raylava.train.engine import Engine
from tests.support.attention import AttentionCalls

DEFAULTS = {"lr": 1e-3, "max_grad_norm": 1.0, "weight_decay": 0.01, "precision": "fp32"}
GLOBAL_BATCH_SIZE, MAX_TOKENS_PER_PACK = 8, 384
CHECKPOINT_STEP = 2  # the last step before the checkpoint
SPARE_BYTES = 2**28  # address space that the starved run may allocate


def main(spec: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(spec["rank"])  # torchrun sets it; DeepSpeed reads it
    rendezvous = f"file://{spec['rendezvous']}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=spec["rank"], world_size=spec["world_size"])
    model = resolve_model(Model(language=Language(name=spec["language"]), vision=Vision(name=spec["vision"])))
    for name, options in spec["runs"].items():
        run = Run(model, Blocks(Path(spec["blocks"])), options)
        for line in [{"message": run.starve()}] if options.get("starve") else run.steps():
            if spec["rank"] == 0:  # the pipes of other ranks are not read while the runs last
                sys.stdout.write(json.dumps({"run": name} | line) + "\n")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an ordinary interpreter exit


class Run:
    """One run on this rank."""

    def __init__(self, model: ResolvedModel, blocks: Blocks, options: dict[str, Any]) -> None:
        self._blocks, self._options = blocks, options
        self._plan = BatchPlan(len(blocks), GLOBAL_BATCH_SIZE, epochs=options.get("epochs", 1), seed=0)
        training = Training.model_validate(DEFAULTS | options["training"])
        llava = build_llava(model, 0, DTYPES[training.precision], training.attn_implementation)
        stage, device = options.get("stage", "finetune"), torch.device("cpu")
        resolver = AutoResolver(
            stage, model.shape(llava.config.text_config.vocab_size), blocks.lengths, self._plan, device
        )
        self._resolved: ResolvedTraining = resolver.resolve_auto(training, self._saved_zero_stage())
        checkpoint = Path(options["resume"]) if "resume" in options else None
        self._engine = Engine(llava, stage, self._resolved.training, self._plan.steps, device, checkpoint)
        token_ids = load_tokenizer(model.language).convert_tokens_to_ids([IMAGE_TOKEN, "<bos>"])
        self._collator = PackCollator(model.vision, *token_ids)

    def _saved_zero_stage(self) -> int | None:
        if "resume" not in self._options:
            return None
        return read_checkpoint_meta(storage_path(self._options["resume"])).zero_stage

    def steps(self) -> Iterator[dict[str, Any]]:
        """Train, and yield the result of each step; the last one has a hash of the weights."""
        first_step = self._engine.first_step
        if self._options.get("memory_dry_run"):
            self._engine.memory_dry_run([self._collator.collate([self._blocks[0], self._blocks[1]])], "")
        self._engine.restore()
        for batch in self._mixed_batches() if self._options.get("mixed") else self._loader(first_step):
            yield self._step(batch)

    def _step(self, batch: StepBatch) -> dict[str, Any]:
        step, options, engine = batch.step.number, self._options, self._engine
        if step == options.get("poison") and dist.get_rank() == dist.get_world_size() - 1:
            batch.packs[0].pixel_values.fill_(torch.nan)
        with AttentionCalls() if options.get("count_attention") else nullcontext(AttentionCalls()) as calls:
            result = engine.step(step, batch.packs)
        if step == CHECKPOINT_STEP and "checkpoint" in options:
            engine.save(Path(options["checkpoint"]), next_step=CHECKPOINT_STEP + 1)
            engine.wait_for_save()
        if step == 0 and "moments" in options:
            _write_moments(engine, options["moments"])
        resolved = self._resolved
        line = {
            "step": step,
            **vars(result),
            "attention_calls": [calls.masked, calls.causal],
            "samples": sum(len(pack.cu_seqlens) - 1 for pack in batch.packs),
            "packs": len(batch.packs),
            "mechanisms": engine.mechanisms(),
            "execution_config": vars(resolved.candidate.config),
            "advice": resolved.advice,
        }
        if step == self._plan.steps - 1:
            line["weights"] = _sha256(engine.weights(only_trained=False))
        return line

    def _loader(self, first_step: int) -> PackedDataLoader:
        return PackedDataLoader(
            self._blocks,
            self._plan,
            self._collator,
            dist.get_rank(),
            dist.get_world_size(),
            MAX_TOKENS_PER_PACK,
            first_step=first_step,
            prepare=self._engine.prepare,
        )

    def _mixed_batches(self) -> Iterator[StepBatch]:
        """Yield steps of 12 samples, six of them without their image.

        On three ranks, one gets two packs of text only, one two packs with images, one two packs of both; a single rank
        gets all six packs.
        """
        for step in itertools.islice(self._plan.from_step(0), 4):
            samples = [self._blocks[(12 * step.number + n) % len(self._blocks)] for n in range(12)]
            text = [_without_image(sample, self._collator.image_token_id) for sample in samples[:6]]
            with_image = samples[6:]
            ranks = (
                [text[:2], text[2:4]],
                [with_image[:2], with_image[2:4]],
                [[text[4], with_image[4]], [text[5], with_image[5]]],
            )
            groups_by_rank = [ranks[dist.get_rank()]] if dist.get_world_size() > 1 else ranks
            loss_tokens = sum(sample.loss_tokens for sample in [*text, *with_image])
            packs = [
                self._collator.collate(group, [1.0 / loss_tokens] * len(group))
                for groups in groups_by_rank
                for group in groups
            ]
            yield StepBatch(step, packs, loss_tokens, tokens=0)

    def starve(self) -> str:
        """Return the error of a memory dry run of a huge pack in a process with little memory left."""
        pack = self._collator.collate([self._blocks[number] for number in range(len(self._blocks))] * 20)
        return _starve(self._engine, pack)


def _without_image(sample: Sample, image_token_id: int) -> Sample:
    position = sample.input_ids.index(image_token_id)
    ids = [token for token in sample.input_ids if token != image_token_id]
    spans = [(start - (start > position), stop - (stop > position)) for start, stop in sample.loss_spans]
    return Sample(sample.sample_id, ids, spans, [], len(ids))


def _write_moments(engine: Engine, file: str) -> None:
    """Write Adam's first moments of all trained weights.

    With beta1 = 0.9 and no clipping they are a tenth of the first step's gradient.
    """
    optimizer = engine._engine.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):  # stages 1 and 2 link too early when there are several groups
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    moments = {
        name: safe_get_full_optimizer_state(weight, "exp_avg").clone()
        for name, weight in engine.llava.named_parameters()
        if weight.requires_grad
    }
    if dist.get_rank() == 0:
        save_file(moments, file)


def _starve(engine: Engine, pack: HostPack) -> str:
    limit = psutil.Process().memory_info().vms + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        engine.memory_dry_run([pack], "use less")
    except RunError as error:
        return str(error)
    return "no error"


def _sha256(weights: dict[str, torch.Tensor] | None) -> str:
    digest = hashlib.sha256()
    for name, value in sorted((weights or {}).items()):
        digest.update(name.encode() + value.float().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
