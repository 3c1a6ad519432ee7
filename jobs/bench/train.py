"""How fast LLaVA trains: raylava's engine beside the LLaVA recipe as people run it, in one run and without Ray.

    python jobs/bench/train.py [--shape gemma-2b] [--stage finetune] [--ladder] [--rounds N]

All ways start from the same random weights and train on the same samples on the same device, under DeepSpeed ZeRO 2.
The reference pads batches to their longest row, groups them by modality and length as LLaVA's sampler does, and
computes all logits; once it recomputes activations (LLaVA-1.5's scripts), once not (LLaVA-Gemma's). Its batches lie
ready as tensors, while raylava reads blocks through its feed. Useful tokens are those of samples, without padding.
"""

import argparse
import json
import logging
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from shapes import BATCH, MICRO_BATCH, SHAPES, Shape, build, draw, layout, write_blocks
from torch import Tensor, nn

from raylava.config.recipe import Training, ZeroConfig
from raylava.corpus.blocks import Blocks
from raylava.models.attention import VARLEN
from raylava.models.llava import PackLoss, StageName, set_trainable
from raylava.perf.flops import step_flops
from raylava.perf.hardware import peak_flops
from raylava.perf.shapes import LlavaShape, shape_from_config
from raylava.train import engine as engine_room
from raylava.train.batch_plan import BatchPlan
from raylava.train.data_loader import PackCollator, PackedDataLoader
from raylava.train.engine import DTYPES, Engine, deepspeed_config
from raylava.train.metrics import memory_gb

STAGES: tuple[StageName, ...] = ("pretrain", "finetune")


@dataclass(frozen=True)
class ExecutionConfig:
    """One way to train. `packs` False is the reference; the other switches matter to packs only."""

    name: str
    packs: bool = True
    activation_checkpointing: bool = False
    loss_only_logits: bool = True
    attention: str = VARLEN


REFERENCES = (
    ExecutionConfig("LLaVA recipe, recomputing", packs=False, activation_checkpointing=True),
    ExecutionConfig("LLaVA recipe", packs=False),
)
RUNGS = (
    ExecutionConfig("+ packs", loss_only_logits=False, attention="sdpa"),
    ExecutionConfig("+ logits where loss_tokens", attention="sdpa"),
)
RAYLAVA = ExecutionConfig("raylava")


@dataclass(frozen=True)
class Measured:
    """One way's figures over the timed steps. Memory is what training added, at its peak."""

    tokens: int
    seconds: float
    waiting: float
    memory_gb: float
    flops: float
    loss: float


@dataclass(frozen=True)
class Batch:
    """A reference's micro-batch: rows padded on the right to the longest."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pixel_values: Tensor | None


def grouped(samples: np.ndarray, blocks: Blocks, batch: int, micro_batch: int) -> Iterator[list[int]]:
    """Micro-batches as LLaVA's sampler makes them: images and text apart; within each global batch, sorted samples
    are dealt out so that micro-batches are alike in total length. What is left of both kinds is mixed.
    """
    rng = np.random.default_rng(0)
    lengths, images = blocks.lengths.length, blocks.lengths.images
    left: list[int] = []
    for kind in (samples[images[samples] > 0], samples[images[samples] == 0]):
        order = rng.permutation(kind)
        whole = len(order) // batch * batch
        left += [int(sample) for sample in order[whole:]]
        for first in range(0, whole, batch):
            yield from _dealt(order[first : first + batch].tolist(), lengths, batch // micro_batch)
    for first in range(0, len(left), batch):
        rest = left[first : first + batch]
        yield from _dealt(rest, lengths, max(1, len(rest) // micro_batch))


def _dealt(samples: list[int], lengths: np.ndarray, count: int) -> list[list[int]]:
    most = -(-len(samples) // count)
    chunks: list[list[int]] = [[] for _ in range(count)]
    for sample in sorted(samples, key=lambda sample: -int(lengths[sample])):
        open_ones = [chunk for chunk in chunks if len(chunk) < most]
        min(open_ones, key=lambda chunk: sum(int(lengths[one]) for one in chunk)).append(sample)
    return chunks


def padded(numbers: list[int], blocks: Blocks, layout: PackCollator) -> Batch:
    """Samples as rows of one batch."""
    packs = [layout.tensors([blocks[number]]) for number in numbers]
    lengths = [int(blocks.lengths.length[number]) for number in numbers]
    ids = torch.zeros(len(packs), max(lengths), dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (pack, length) in enumerate(zip(packs, lengths, strict=True)):
        ids[row, :length] = pack.input_ids[0, :length]
        mask[row, :length] = 1
        labels[row, pack.target_positions + 1] = pack.labels
    shown = [pack.pixel_values for pack, number in zip(packs, numbers, strict=True) if blocks.lengths.images[number]]
    return Batch(ids, mask, labels, torch.cat(shown) if shown else None)


class WholeLogits(PackLoss):
    """A rung of the ladder: packs with the logits of all positions."""

    def logits(
        self, input_ids: Tensor, position_ids: Tensor, pixel_values: Tensor, keep: Tensor, cu_seqlens: Tensor
    ) -> Tensor:
        every = torch.arange(input_ids.shape[1], device=input_ids.device)
        return super().logits(input_ids, position_ids, pixel_values, every, cu_seqlens)[keep]


class Usual(nn.Module):
    """The reference's forward: transformers' own loss."""

    def __init__(self, llava: nn.Module) -> None:
        super().__init__()
        self.llava = llava

    def forward(self, **batch: Tensor | None) -> Tensor:
        return self.llava(**batch, use_cache=False).loss


class Bench:
    """One way over one corpus, in this process."""

    def __init__(
        self, way: ExecutionConfig, shape: Shape, stage: StageName, folder: Path, device: torch.device
    ) -> None:
        self._way, self._shape, self._stage, self._device = way, shape, stage, device
        self._blocks = Blocks(folder)
        self._plan = BatchPlan(len(self._blocks), BATCH[stage], epochs=1, seed=0)
        self._layout = layout(shape)
        self._training = Training(
            lr=1e-3 if stage == "pretrain" else 2e-5,
            precision=shape.precision,
            max_tokens_per_pack=shape.max_tokens_per_pack,
            zero=ZeroConfig(stage=2),
            activation_checkpointing=way.activation_checkpointing,
            attention=way.attention,
        )

    def run(self) -> Measured:
        """The first step is not timed."""
        before = memory_gb(self._device)
        llava = build(self._shape, self._way.attention if self._way.packs else "sdpa", self._device)
        shape = shape_from_config(llava.config)
        seconds, waiting, loss = self._packed(llava) if self._way.packs else self._padded(llava)
        timed = self._timed()
        lengths = self._blocks.lengths
        return Measured(
            int(lengths.length[timed].sum()),
            seconds,
            waiting,
            _peak_gb(self._device) - before,
            self._flops(shape, timed),
            loss,
        )

    def _timed(self) -> np.ndarray:
        return np.concatenate([step.samples for step in self._plan.from_step(1)])

    def _flops(self, shape: LlavaShape, samples: np.ndarray) -> float:
        lengths = self._blocks.lengths
        images, loss_tokens = int(lengths.images[samples].sum()), int(lengths.loss_tokens[samples].sum())
        own = [int(length) for length in lengths.length[samples]]
        return step_flops(shape, own, images, loss_tokens, language=self._stage == "finetune", vision=False).total

    def _packed(self, llava: Any) -> tuple[float, float, float]:
        engine_room.PackLoss = PackLoss if self._way.loss_only_logits else WholeLogits  # type: ignore[misc]
        engine = Engine(llava, self._stage, self._training, self._plan.steps, self._device)
        feed = PackedDataLoader(self._blocks, self._plan, self._layout, 0, 1, self._shape.max_tokens_per_pack)
        started = asked = time.monotonic()
        waiting = loss = 0.0
        for work in feed:
            waiting += time.monotonic() - asked
            loss = engine.step(work.step.number, work.packs, work.loss_tokens).loss
            asked = time.monotonic()
            if work.step.number == 0:
                started, waiting = asked, 0.0
        return time.monotonic() - started, waiting, loss

    def _padded(self, llava: Any) -> tuple[float, float, float]:
        import deepspeed

        stage = self._stage
        set_trainable(llava, stage)
        llava.train()
        if self._way.activation_checkpointing:
            llava.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            llava.enable_input_require_grads()
        batch, micro_batch = BATCH[stage], MICRO_BATCH[stage]
        trained = [weight for weight in llava.parameters() if weight.requires_grad]
        settings = deepspeed_config(self._training, sum(weight.numel() for weight in trained)) | {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": batch // micro_batch,
            "managed_gradient_accumulation": True,
        }
        engine, *_ = deepspeed.initialize(
            model=Usual(llava),
            optimizer=torch.optim.AdamW(trained, lr=self._training.lr),
            config=settings,
            dist_init_required=False,
        )
        first = next(self._plan.from_step(0)).samples
        parts = [list(grouped(samples, self._blocks, batch, micro_batch)) for samples in (first, self._timed())]
        warm, timed = ([padded(numbers, self._blocks, self._layout) for numbers in part] for part in parts)
        self._train(engine, warm)
        started = time.monotonic()
        loss = self._train(engine, timed)
        return time.monotonic() - started, 0.0, loss

    def _train(self, engine: Any, batches: list[Batch]) -> float:
        dtype, loss = DTYPES[self._shape.precision], torch.zeros(())
        for batch in batches:
            pixels = batch.pixel_values
            loss = engine(
                input_ids=batch.input_ids.to(self._device),
                attention_mask=batch.attention_mask.to(self._device),
                labels=batch.labels.to(self._device),
                pixel_values=None if pixels is None else pixels.to(self._device, dtype),
            )
            engine.backward(loss)
            engine.step()
        return float(loss.detach())


def _peak_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return memory_gb(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _measured(way: ExecutionConfig, shape: str, stage: StageName, folder: Path, device: str, pipe: Any) -> None:
    logging.disable(logging.WARNING)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ.setdefault("DS_ACCELERATOR", device)
    import deepspeed  # noqa: F401 (so that its import counts for nobody's memory)

    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    pipe.send(Bench(way, SHAPES[shape], stage, folder, torch.device(device)).run())


def measure(way: ExecutionConfig, shape: str, stage: StageName, folder: Path, device: str) -> Measured:
    """One way in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(way, shape, stage, folder, device, theirs))
    process.start()
    theirs.close()
    try:
        found: Measured = ours.recv()
    except EOFError:
        sys.exit(f"{way.name}: failed, see above")
    finally:
        process.join()
    return found


def show(stage: StageName, rounds: dict[str, list[Measured]], shape: str, device: str) -> None:
    """One stage's table."""
    console = Console(file=sys.stdout, width=120)
    table = Table(title=f"{stage}, {shape} on {device}", title_justify="left")
    for heading in ("way", "useful tokens/s", "of 1st", "of 2nd", "waiting", "peak GB", "model TFLOP/s", "MFU"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    speed = {name: _rate(found, "tokens") for name, found in rounds.items()}
    first, second = (speed[way.name] for way in REFERENCES)
    peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    for name, found in rounds.items():
        flops = _rate(found, "flops")
        waiting = sum(one.waiting for one in found) / sum(one.seconds for one in found)
        table.add_row(
            name,
            f"{speed[name]:,.0f}",
            f"{speed[name] / first:.2f}",
            f"{speed[name] / second:.2f}",
            f"{waiting:.1%}" if name not in [way.name for way in REFERENCES] else "-",
            f"{max(one.memory_gb for one in found):.2f}",
            f"{flops / 1e12:.3f}",
            f"{flops / peak:.1%}" if peak else "-",
        )
    console.print(table)


def _rate(found: list[Measured], what: str) -> float:
    return sum(getattr(one, what) for one in found) / sum(one.seconds for one in found)


def main() -> None:
    """Measure all ways, in turn, and print a table a stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--steps", type=int, default=4, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ladder", action="store_true", help="switch raylava's mechanisms on one by one")
    arguments = parser.parse_args()
    ways = (*REFERENCES, *(RUNGS if arguments.ladder else ()), RAYLAVA)
    for stage in [arguments.stage] if arguments.stage else STAGES:
        with tempfile.TemporaryDirectory() as name:
            folder, shape = Path(name) / "blocks", SHAPES[arguments.shape]
            write_blocks(draw(shape, stage, BATCH[stage] * (arguments.steps + 1)), folder)
            found: dict[str, list[Measured]] = {way.name: [] for way in ways}
            for _ in range(arguments.rounds):
                for way in ways:
                    found[way.name].append(measure(way, arguments.shape, stage, folder, arguments.device))
                    sys.stderr.write(json.dumps({"stage": stage, "way": way.name} | asdict(found[way.name][-1])) + "\n")
            show(stage, found, arguments.shape, arguments.device)


if __name__ == "__main__":
    main()
