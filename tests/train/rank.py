"""One rank of an engine without Ray, for test_engine.py: six steps, a checkpoint after three, a JSON line each."""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from raylava.corpus.blocks import Blocks
from raylava.model.backbones import load_tokenizer, resolve_vision
from raylava.model.llava import assemble
from raylava.model.templates import IMAGE_TOKEN
from raylava.recipe import Language, Model, Training, Vision, Zero
from raylava.train.engine import Engine
from raylava.train.feed import Feed, Layout
from raylava.train.plan import EpochPlan


def main(
    rank: str,
    world_size: str,
    rendezvous: str,
    language: str,
    vision: str,
    blocks: str,
    zero: str,
    checkpoint: str,
    resume: str = "",
) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = rank  # as torchrun would; DeepSpeed asks for it
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world_size))
    model = Model(language=Language(name=language), vision=Vision(name=vision))
    spec = resolve_vision(model.vision)
    corpus = Blocks(Path(blocks))
    plan = EpochPlan(len(corpus), 8, epochs=1, seed=0)
    training = Training(lr=1e-3, clip_norm=1.0, weight_decay=0.01, precision="fp32", zero=Zero(stage=int(zero)))
    llava = assemble(model, spec, seed=0, dtype=torch.float32)
    engine = Engine(llava, "finetune", training, plan.steps, torch.device("cpu"))
    first = engine.load(Path(checkpoint)) if resume else 0
    layout = Layout(spec, *load_tokenizer(model.language).convert_tokens_to_ids([IMAGE_TOKEN, "<bos>"]))
    for work in Feed(corpus, plan, layout, int(rank), int(world_size), pack_tokens=384, first=first):
        result = engine.step(work.step.number, work.packs, work.supervised)
        if work.step.number == 2 and checkpoint != "-":
            engine.save(Path(checkpoint), cursor=3)
        line = {"step": work.step.number, "loss": result.loss, "gradient_norm": result.gradient_norm}
        if work.step.number == plan.steps - 1:
            line["weights"] = _digest(engine.weights(only_trained=False))
        sys.stdout.write(json.dumps(line) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an ordinary interpreter exit


def _digest(weights: dict[str, torch.Tensor] | None) -> str:
    digest = hashlib.sha256()
    for name, value in sorted((weights or {}).items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
