"""One rank of an engine without Ray, for test_engine.py: runs of six steps, a JSON line for each step.

The one argument is JSON: rank, world_size, rendezvous, language, vision, blocks, and `runs`: for each name its training
settings, and where wanted stage, checkpoint (a folder written after step 3), resume (a folder to go on from), rehearse,
poison (a step whose pictures hold NaN on the last rank).
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raylava.corpus.blocks import Blocks
from raylava.model.backbones import load_tokenizer, resolve_vision
from raylava.model.llava import assemble
from raylava.model.templates import IMAGE_TOKEN
from raylava.recipe import Language, Model, Training, Vision
from raylava.train.engine import Engine
from raylava.train.feed import Feed, Layout
from raylava.train.plan import EpochPlan

DEFAULTS = {"lr": 1e-3, "clip_norm": 1.0, "weight_decay": 0.01, "precision": "fp32"}


def main(given: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(given["rank"])  # as torchrun would; DeepSpeed asks for it
    rendezvous = f"file://{given['rendezvous']}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=given["rank"], world_size=given["world_size"])
    for name, run in given["runs"].items():
        for line in steps(given, run):
            sys.stdout.write(json.dumps({"run": name} | line) + "\n")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an ordinary interpreter exit


def steps(given: dict[str, Any], run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    rank, world_size = given["rank"], given["world_size"]
    model = Model(language=Language(name=given["language"]), vision=Vision(name=given["vision"]))
    spec = resolve_vision(model.vision)
    corpus = Blocks(Path(given["blocks"]))
    plan = EpochPlan(len(corpus), 8, epochs=1, seed=0)
    training = Training.model_validate(DEFAULTS | run["training"])
    llava = assemble(model, spec, seed=0, dtype=torch.float32)
    engine = Engine(llava, run.get("stage", "finetune"), training, plan.steps, torch.device("cpu"))
    first = engine.load(Path(run["resume"])) if "resume" in run else 0
    layout = Layout(spec, *load_tokenizer(model.language).convert_tokens_to_ids([IMAGE_TOKEN, "<bos>"]))
    if run.get("rehearse"):
        engine.rehearse([layout.tensors([corpus[0], corpus[1]])])
    for work in Feed(corpus, plan, layout, rank, world_size, pack_tokens=384, first=first):
        if work.step.number == run.get("poison") and rank == world_size - 1:
            work.packs[0].pixel_values.fill_(torch.nan)
        result = engine.step(work.step.number, work.packs, work.supervised)
        if work.step.number == 2 and "checkpoint" in run:
            engine.save(Path(run["checkpoint"]), cursor=3)
            engine.written()
        line = {"step": work.step.number, **vars(result)}
        if work.step.number == plan.steps - 1:
            line["weights"] = _digest(engine.weights(only_trained=False))
        yield line


def _digest(weights: dict[str, torch.Tensor] | None) -> str:
    digest = hashlib.sha256()
    for name, value in sorted((weights or {}).items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
