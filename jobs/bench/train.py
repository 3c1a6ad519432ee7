"""Training throughput: raylava's engine beside the LLaVA recipe as commonly run, in one process tree without Ray.

    python jobs/bench/train.py [--shape gemma-2b] [--stage finetune] [--ladder] [--rounds N]

All configurations start from the same random weights and train on the same samples on the same device, with DeepSpeed
ZeRO 2. The reference pads batches to their longest row, groups them by modality and length like LLaVA's sampler, and
computes the logits of all positions; it runs with activation checkpointing (as LLaVA-1.5's scripts) and without (as
LLaVA-Gemma's). Its batches are prebuilt tensors, while raylava reads blocks through its data loader. Useful tokens
exclude padding.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from shapes import (
    GLOBAL_BATCH_SIZE,
    SHAPES,
    Shape,
    draw_samples,
    pack_collator,
    resolve_backbones,
    write_backbones,
    write_blocks,
)
from torch import Tensor, nn

from raylava.compat.torch import is_out_of_memory
from raylava.config.recipe import StageName, Training, ZeroConfig
from raylava.corpus.blocks import Blocks
from raylava.models.attention import VARLEN
from raylava.models.llava import DTYPES, PackLoss, build_llava, set_trainable
from raylava.models.packs import PackTensors
from raylava.perf.flops import step_flops
from raylava.perf.hardware import peak_flops
from raylava.perf.shapes import LlavaShape
from raylava.train import engine as engine_module
from raylava.train.batch_plan import BatchPlan
from raylava.train.data_loader import PackCollator, PackedDataLoader
from raylava.train.engine import Engine, deepspeed_config
from raylava.train.metrics import memory_gb

STAGES: tuple[StageName, ...] = ("pretrain", "finetune")


@dataclass(frozen=True)
class LadderRung:
    """A configuration to measure. Without `packs` it is the reference; the later switches apply to packs only."""

    name: str
    packs: bool = True
    activation_checkpointing: bool = False
    loss_only_logits: bool = True
    attention: str = VARLEN


REFERENCES = (
    LadderRung("LLaVA recipe, recomputing", packs=False, activation_checkpointing=True),
    LadderRung("LLaVA recipe", packs=False),
)
LADDER = (
    LadderRung("+ packs", loss_only_logits=False, attention="sdpa"),
    LadderRung("+ logits of loss tokens", attention="sdpa"),
)
RAYLAVA = LadderRung("raylava")


@dataclass(frozen=True)
class Measurement:
    """Totals over the timed steps of one configuration. Memory is the peak that training added."""

    tokens: int
    seconds: float
    data_wait_s: float
    memory_gb: float
    flops: float
    loss: float


@dataclass(frozen=True)
class PaddedBatch:
    """A micro-batch of the reference: rows padded on the right to the longest."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pixel_values: Tensor | None


def group_by_length(
    samples: np.ndarray, blocks: Blocks, global_batch_size: int, micro_batch_size: int
) -> Iterator[list[int]]:
    """Yield micro-batches as LLaVA's sampler forms them.

    Samples with and without images are separated. Within each global batch, samples are sorted and distributed such
    that the micro-batches have similar total lengths. The remainders of both modalities are mixed.
    """
    rng = np.random.default_rng(0)
    lengths, images = blocks.lengths.length, blocks.lengths.images
    remainder: list[int] = []
    for modality in (samples[images[samples] > 0], samples[images[samples] == 0]):
        order = rng.permutation(modality)
        full = len(order) // global_batch_size * global_batch_size
        remainder += [int(sample) for sample in order[full:]]
        for start in range(0, full, global_batch_size):
            batch = order[start : start + global_batch_size].tolist()
            yield from _balanced_chunks(batch, lengths, global_batch_size // micro_batch_size)
    for start in range(0, len(remainder), global_batch_size):
        batch = remainder[start : start + global_batch_size]
        yield from _balanced_chunks(batch, lengths, max(1, len(batch) // micro_batch_size))


def _balanced_chunks(samples: list[int], lengths: np.ndarray, count: int) -> list[list[int]]:
    """Distribute samples over `count` chunks of at most equal size with similar total lengths, longest first."""
    max_samples = -(-len(samples) // count)
    chunks: list[list[int]] = [[] for _ in range(count)]
    for sample in sorted(samples, key=lambda sample: -int(lengths[sample])):
        open_chunks = [chunk for chunk in chunks if len(chunk) < max_samples]
        min(open_chunks, key=lambda chunk: sum(int(lengths[other]) for other in chunk)).append(sample)
    return chunks


def pad_samples(numbers: list[int], blocks: Blocks, collator: PackCollator) -> PaddedBatch:
    """Return samples as the rows of one padded batch."""
    packs = [collator.collate([blocks[number]]).to(torch.device("cpu"), torch.float32) for number in numbers]
    lengths = [int(blocks.lengths.length[number]) for number in numbers]
    ids = torch.zeros(len(packs), max(lengths), dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (pack, length) in enumerate(zip(packs, lengths, strict=True)):
        ids[row, :length] = pack.input_ids[0, :length]
        mask[row, :length] = 1
        labels[row, pack.target_positions + 1] = pack.labels
    pixels = [pack.pixel_values for pack, number in zip(packs, numbers, strict=True) if blocks.lengths.images[number]]
    return PaddedBatch(ids, mask, labels, torch.cat(pixels) if pixels else None)


class AllLogitsLoss(PackLoss):
    """PackLoss that computes the logits of all positions, for the ladder."""

    def description(self) -> str:
        """Describe where logits are computed."""
        return "at all positions"

    def forward(self, **pack: Tensor) -> Tensor:
        """Return the weighted loss of a pack, whose logits are selected from those of all positions."""
        tensors = PackTensors(**pack)
        all_positions = torch.arange(tensors.input_ids.shape[1], device=tensors.input_ids.device)
        logits = self.logits(replace(tensors, target_positions=all_positions))[tensors.target_positions]
        losses = nn.functional.cross_entropy(logits.float(), tensors.labels, reduction="none")
        return (losses * tensors.loss_weights).sum()


class ReferenceLoss(nn.Module):
    """The reference's forward pass, with transformers' own loss."""

    def __init__(self, llava: nn.Module) -> None:
        super().__init__()
        self.llava = llava

    def forward(self, **batch: Tensor | None) -> Tensor:
        """Return the mean loss of a padded batch."""
        return self.llava(**batch, use_cache=False).loss


class TrainingBenchmark:
    """Measures one configuration on one corpus in this process."""

    def __init__(self, rung: LadderRung, shape: Shape, stage: StageName, folder: Path, device: torch.device) -> None:
        self._rung, self._shape, self._stage, self._device = rung, shape, stage, device
        self._model = resolve_backbones(folder)
        self._blocks = Blocks(folder / "blocks")
        self._plan = BatchPlan(len(self._blocks), GLOBAL_BATCH_SIZE[stage], epochs=1, seed=0)
        self._collator = pack_collator(self._model)
        self._training = Training(
            lr=1e-3 if stage == "pretrain" else 2e-5,
            precision=shape.precision,
            max_tokens_per_pack=shape.max_tokens_per_pack,
            zero=ZeroConfig(stage=2),
            activation_checkpointing=rung.activation_checkpointing,
            attn_implementation=rung.attention,
        )

    def run(self) -> Measurement:
        """Train for one epoch and measure all steps but the first."""
        initial_gb = memory_gb(self._device)
        attention = self._rung.attention if self._rung.packs else "sdpa"
        llava = build_llava(self._model, 0, DTYPES[self._shape.precision], attention)
        shape = self._model.shape(self._shape.vocabulary)
        seconds, data_wait_s, loss = self._train_packs(llava) if self._rung.packs else self._train_padded(llava)
        samples = self._timed_samples()
        lengths = self._blocks.lengths
        return Measurement(
            int(lengths.length[samples].sum()),
            seconds,
            data_wait_s,
            _peak_gb(self._device) - initial_gb,
            self._flops(shape, samples),
            loss,
        )

    def _timed_samples(self) -> np.ndarray:
        return np.concatenate([step.samples for step in self._plan.from_step(1)])

    def _flops(self, shape: LlavaShape, samples: np.ndarray) -> float:
        lengths = self._blocks.lengths
        images, loss_tokens = int(lengths.images[samples].sum()), int(lengths.loss_tokens[samples].sum())
        tokens = [int(length) for length in lengths.length[samples]]
        return step_flops(shape, tokens, images, loss_tokens, language=self._stage == "finetune", vision=False).total

    def _train_packs(self, llava: Any) -> tuple[float, float, float]:
        """Return (seconds, seconds of waiting for data, final loss) of the timed steps."""
        engine_module.PackLoss = PackLoss if self._rung.loss_only_logits else AllLogitsLoss  # type: ignore[misc]
        engine = Engine(llava, self._stage, self._training, self._plan.steps, self._device)
        loader = PackedDataLoader(self._blocks, self._plan, self._collator, 0, 1, self._shape.max_tokens_per_pack)
        start = wait_start = time.monotonic()
        data_wait_s = loss = 0.0
        for batch in loader:
            data_wait_s += time.monotonic() - wait_start
            loss = engine.step(batch.step.number, batch.packs).loss
            wait_start = time.monotonic()
            if batch.step.number == 0:
                start, data_wait_s = wait_start, 0.0
        return time.monotonic() - start, data_wait_s, loss

    def _train_padded(self, llava: Any) -> tuple[float, float, float]:
        """Return (seconds, 0, final loss) of the timed steps; the batches are built before."""
        from raylava.compat.deepspeed import BackgroundWriter, initialize

        stage = self._stage
        set_trainable(llava, stage)
        llava.to(self._device).train()
        if self._rung.activation_checkpointing:
            llava.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            llava.enable_input_require_grads()
        batch_size, micro_batch_size = GLOBAL_BATCH_SIZE[stage], self._shape.micro_batch_size[stage]
        trainable = [weight for weight in llava.parameters() if weight.requires_grad]
        settings = deepspeed_config(self._training, sum(weight.numel() for weight in trainable)) | {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": batch_size // micro_batch_size,
            "managed_gradient_accumulation": True,
        }
        optimizer = torch.optim.AdamW(trainable, lr=self._training.lr)
        engine = initialize(ReferenceLoss(llava), optimizer, settings, BackgroundWriter(set()), self._device)
        first_step = next(self._plan.from_step(0)).samples
        warmup_batches, timed_batches = (
            [
                pad_samples(numbers, self._blocks, self._collator)
                for numbers in group_by_length(samples, self._blocks, batch_size, micro_batch_size)
            ]
            for samples in (first_step, self._timed_samples())
        )
        self._train_batches(engine, warmup_batches)
        start = time.monotonic()
        loss = self._train_batches(engine, timed_batches)
        return time.monotonic() - start, 0.0, loss

    def _train_batches(self, engine: Any, batches: list[PaddedBatch]) -> float:
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


def _run_benchmark(rung: LadderRung, shape: str, stage: StageName, folder: Path, device: str, sender: Any) -> None:
    logging.disable(logging.WARNING)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ.setdefault("DS_ACCELERATOR", device)
    import deepspeed  # noqa: F401 (imported first so that the measured memory does not include it)

    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sender.send(TrainingBenchmark(rung, SHAPES[shape], stage, folder, torch.device(device)).run())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sender.send(None)


def measure(rung: LadderRung, shape: str, stage: StageName, folder: Path, device: str) -> Measurement | None:
    """Measure one configuration in a separate process. Return None if it runs out of memory."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=_run_benchmark, args=(rung, shape, stage, folder, device, sender))
    process.start()
    sender.close()
    try:
        measurement: Measurement | None = receiver.recv()
    except EOFError:
        sys.exit(f"{rung.name}: failed; see the error above")
    finally:
        process.join()
    return measurement


def print_results(stage: StageName, rounds: dict[str, list[Measurement]], shape: str, device: str) -> None:
    """Print the table of one stage."""
    console = Console(file=sys.stdout, width=120)
    table = Table(title=f"{stage}, {shape} on {device}", title_justify="left")
    columns = ("configuration", "useful tokens/s", "of 1st", "of 2nd", "data wait", "peak GB", "model TFLOP/s", "MFU")
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "configuration" else "right")
    tokens_per_s = {name: _rate(measurements, "tokens") for name, measurements in rounds.items() if measurements}
    first, second = (tokens_per_s.get(reference.name) for reference in REFERENCES)
    peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    for name, measurements in rounds.items():
        if not measurements:
            table.add_row(name, "out of memory")
            continue
        flops = _rate(measurements, "flops")
        is_reference = name in [reference.name for reference in REFERENCES]
        table.add_row(
            name,
            f"{tokens_per_s[name]:,.0f}",
            f"{tokens_per_s[name] / first:.2f}" if first else "-",
            f"{tokens_per_s[name] / second:.2f}" if second else "-",
            "-" if is_reference else f"{_rate(measurements, 'data_wait_s'):.1%}",
            f"{max(measurement.memory_gb for measurement in measurements):.2f}",
            f"{flops / 1e12:.3f}",
            f"{flops / peak:.1%}" if peak else "-",
        )
    console.print(table)


def _rate(measurements: list[Measurement], field: str) -> float:
    """Return the sum of the field per second, over all rounds."""
    total = sum(getattr(measurement, field) for measurement in measurements)
    return total / sum(measurement.seconds for measurement in measurements)


def main() -> None:
    """Measure all configurations in turn, and print a table for each stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--steps", type=int, default=4, help="timed steps per round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ladder", action="store_true", help="also enable raylava's mechanisms one by one")
    arguments = parser.parse_args()
    rungs = (*REFERENCES, *(LADDER if arguments.ladder else ()), RAYLAVA)
    for stage in [arguments.stage] if arguments.stage else STAGES:
        with tempfile.TemporaryDirectory() as name:
            folder, shape = Path(name), SHAPES[arguments.shape]
            write_backbones(shape, folder)
            samples = draw_samples(shape, stage, GLOBAL_BATCH_SIZE[stage] * (arguments.steps + 1))
            write_blocks(samples, folder / "blocks")
            rounds: dict[str, list[Measurement]] = {rung.name: [] for rung in rungs}
            for _ in range(arguments.rounds):
                for rung in rungs:
                    measurement = measure(rung, arguments.shape, stage, folder, arguments.device)
                    if measurement is None:
                        continue
                    rounds[rung.name].append(measurement)
                    line = {"stage": stage, "configuration": rung.name} | asdict(measurement)
                    sys.stderr.write(json.dumps(line) + "\n")
            print_results(stage, rounds, arguments.shape, arguments.device)


if __name__ == "__main__":
    main()
