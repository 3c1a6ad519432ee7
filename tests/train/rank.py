"""One rank of an engine without Ray, for test_engine.py: runs of a few steps, a JSON line for each step on rank 0.

The one argument is JSON: rank, world_size, rendezvous, language, vision, blocks, and `runs`: for each name its training
settings, and where wanted stage, epochs (of six steps; one by default), checkpoint (a folder written after step 3),
resume (a folder to go on from), memory_dry_run, poison (a step whose images hold NaN on the last rank), moments (a file for
Adam's first moments after the first step), mixed (the first of three ranks gets text alone, the second images alone),
starve (memory_dry_run a huge pack with hardly any memory left; must be the last).
"""

import hashlib
import itertools
import json
import os
import resource
import sys
from collections.abc import Iterator
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
from raylava.models.llava import PackTensors, build_llava
from raylava.models.registry import load_tokenizer, resolve_vision
from raylava.models.templates import IMAGE_TOKEN
from raylava.perf.shapes import shape_from_config
from raylava.storage import storage_path
from raylava.train.auto import AutoResolver
from raylava.train.batch_plan import BatchPlan
from raylava.train.data_loader import PackCollator, PackedDataLoader, StepBatch
from raylava.train.engine import DTYPES, Engine, read_checkpoint_meta

DEFAULTS = {"lr": 1e-3, "max_grad_norm": 1.0, "weight_decay": 0.01, "precision": "fp32"}


def main(given: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(given["rank"])  # as torchrun would; DeepSpeed asks for it
    rendezvous = f"file://{given['rendezvous']}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=given["rank"], world_size=given["world_size"])
    for name, run in given["runs"].items():
        for line in steps(given, run):
            if given["rank"] == 0:  # nobody reads the others' pipes meanwhile
                sys.stdout.write(json.dumps({"run": name} | line) + "\n")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an ordinary interpreter exit


def steps(given: dict[str, Any], run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    rank, world_size = given["rank"], given["world_size"]
    model = Model(language=Language(name=given["language"]), vision=Vision(name=given["vision"]))
    spec = resolve_vision(model.vision)
    corpus = Blocks(Path(given["blocks"]))
    plan = BatchPlan(len(corpus), 8, epochs=run.get("epochs", 1), seed=0)
    training = Training.model_validate(DEFAULTS | run["training"])
    llava = build_llava(model, spec, seed=0, dtype=DTYPES[training.precision], attention=training.attn_implementation)
    stage, device = run.get("stage", "finetune"), torch.device("cpu")
    kept = read_checkpoint_meta(storage_path(run["resume"])).zero_stage if "resume" in run else None
    resolved = AutoResolver(stage, shape_from_config(llava.config), corpus.lengths, plan, device).resolve_auto(training, kept)
    engine = Engine(llava, stage, resolved.training, plan.steps, device)
    first = engine.load(Path(run["resume"])) if "resume" in run else 0
    layout = PackCollator(spec, *load_tokenizer(model.language).convert_tokens_to_ids([IMAGE_TOKEN, "<bos>"]))
    if run.get("memory_dry_run"):
        engine.memory_dry_run([layout.tensors([corpus[0], corpus[1]])], "")
    if run.get("starve"):
        yield {"told": _starved(engine, layout.tensors([corpus[n] for n in range(len(corpus))] * 20))}
        return
    feed = PackedDataLoader(corpus, plan, layout, rank, world_size, max_tokens_per_pack=384, first=first)
    for work in _mixed(corpus, plan, layout, rank, world_size) if run.get("mixed") else feed:
        if work.step.number == run.get("poison") and rank == world_size - 1:
            work.packs[0].pixel_values.fill_(torch.nan)
        result = engine.step(work.step.number, work.packs, work.loss_tokens)
        if work.step.number == 2 and "checkpoint" in run:
            engine.save(Path(run["checkpoint"]), cursor=3)
            engine.wait_for_save()
        if work.step.number == 0 and "moments" in run:
            _write_moments(engine, run["moments"])
        line = {"step": work.step.number, **vars(result), "way": vars(resolved.option.config), "advice": resolved.advice}
        if work.step.number == plan.steps - 1:
            line["weights"] = _digest(engine.weights(only_trained=False))
        yield line


def _mixed(corpus: Blocks, plan: BatchPlan, layout: PackCollator, rank: int, world_size: int) -> Iterator[StepBatch]:
    """Steps of 12 samples: on three ranks one has text alone, one images alone, one both; on one rank all of them."""
    for step in itertools.islice(plan.from_step(0), 4):
        first, second = (
            [corpus[(12 * step.number + n) % len(corpus)] for n in part] for part in (range(6), range(6, 12))
        )
        text = [_without_image(sample, layout.image_token_id) for sample in first]
        groups = [text[:2], text[2:4]], [second[:2], second[2:4]], [[text[4], second[4]], [text[5], second[5]]]
        own = [groups[rank]] if world_size > 1 else groups
        packs = [layout.tensors(group) for part in own for group in part]
        loss_tokens = sum(sample.loss_tokens for sample in [*text, *second])
        yield StepBatch(step, packs, loss_tokens, tokens=0)


def _without_image(sample: Sample, image_token: int) -> Sample:
    place = sample.input_ids.index(image_token)
    ids = [token for token in sample.input_ids if token != image_token]
    spans = [(start - (start > place), stop - (stop > place)) for start, stop in sample.loss_spans]
    return Sample(sample.sample_id, ids, spans, [], len(ids))


def _write_moments(engine: Engine, file: str) -> None:
    """Of all trained weights: with a first beta of 0.9 and no clipping, a tenth of the first step's gradient."""
    optimizer = engine._engine.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):  # stages 1 and 2 link too early when there are several groups
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    found = {
        name: safe_get_full_optimizer_state(weight, "exp_avg").clone()
        for name, weight in engine.llava.named_parameters()
        if weight.requires_grad
    }
    if dist.get_rank() == 0:
        save_file(found, file)


def _starved(engine: Engine, pack: PackTensors) -> str:
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
    try:
        engine.memory_dry_run([pack], "use less")
    except RunError as error:
        return str(error)
    return "nothing"


def _digest(weights: dict[str, torch.Tensor] | None) -> str:
    digest = hashlib.sha256()
    for name, value in sorted((weights or {}).items()):
        digest.update(name.encode() + value.float().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
