"""What a training stage has to compute: the lengths of its samples, and the steps that they form.

Read from a prepared corpus, or drawn by stated assumptions where there is none. No weights, no pictures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from raylava.corpus.blocks import LENGTHS, MANIFEST, Lengths, Manifest, read_lengths
from raylava.cost.flops import StepFlops, step_flops
from raylava.cost.memory import Trained
from raylava.cost.speed import Work
from raylava.errors import UserError
from raylava.recipe import Corpus, Training
from raylava.storage import Place
from raylava.train.plan import EpochPlan, Pack, assign
from raylava.train.settle import fullest

CorpusName = Literal["alignment", "instruction"]

# Rows of LLaVA's own files, and the share of them with a picture (LLaVA-1.5's dataset cards).
_KNOWN_ROWS = {"blip_laion_cc_sbu_558k.json": 558_128, "llava_v1_5_mix665k.json": 665_298}
_SHOWN: dict[CorpusName, float] = {"alignment": 1.0, "instruction": 624_610 / 665_298}
_DRAWN = 50_000  # lengths are drawn for so many rows at most, and repeated
_JPEG_BYTES = 0.7  # a pixel, at quality 95
_SAMPLED_STEPS = 24


@dataclass(frozen=True)
class CorpusSize:
    """A corpus as training sees it: lengths of all samples, bytes of its blocks, and where that is from."""

    lengths: Lengths
    bytes: float
    source: str

    @property
    def images(self) -> int:
        """Pictures of all samples."""
        return int(self.lengths.images.sum())


def prepared(place: Place) -> CorpusSize:
    """What lies in a prepared corpus. Raises UserError where there is none."""
    try:
        manifest = Manifest.from_json((place / MANIFEST).read_bytes())
        lengths = read_lengths((place / LENGTHS).read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"--corpus {place}: no prepared corpus there; make one with `raylava run --only prepare`"
        ) from error
    return CorpusSize(lengths, float(sum(block.bytes for block in manifest.blocks)), f"prepared, {place}")


def assumed(name: CorpusName, corpus: Corpus, image_tokens: int, pixels: int, rows: int | None) -> CorpusSize:
    """A corpus like LLaVA's: its known rows (or so many), lengths drawn like theirs and cut at the recipe's longest.

    Raises UserError for files that are not LLaVA's when `rows` is not given.
    """
    count = rows if rows is not None else _known_rows(name, corpus)
    drawn = _draw(name, min(count, _DRAWN), image_tokens, corpus.max_length)
    repeats = -(-count // len(drawn))
    lengths = Lengths(*(np.tile(part, repeats)[:count] for part in (drawn.length, drawn.images, drawn.supervised)))
    text = 5.0 * float(lengths.length.sum() - lengths.images.sum() * image_tokens)  # ids and their lists
    return CorpusSize(
        lengths,
        text + _JPEG_BYTES * pixels**2 * float(lengths.images.sum()),
        f"assumed: {count:,} rows with lengths like those of LLaVA's {name} data",
    )


def _known_rows(name: CorpusName, corpus: Corpus) -> int:
    total = 0.0
    for source in corpus.sources:
        rows = _KNOWN_ROWS.get(source.annotations.rpartition("/")[2])
        if rows is None:
            raise UserError(
                f"corpora.{name}: {source.annotations} is not prepared and its rows are not known; "
                f"give --rows {name}=N, or --corpus with what `raylava run --only prepare` made"
            )
        total += min(rows, source.limit or rows) * source.weight
    return round(total)


def _draw(name: CorpusName, count: int, image_tokens: int, longest: int) -> Lengths:
    """Lognormal lengths; the parameters are estimates of LLaVA's. No sample is longer than `longest`."""
    rng = np.random.default_rng(0)
    shown = (rng.random(count) < _SHOWN[name]).astype(np.int32)
    asked, answered = text_lengths(name, rng, shown)
    room = longest - 1 - shown * image_tokens
    squeeze = np.minimum(1.0, room / (asked + answered))
    before, after = (np.maximum(1, np.floor(part * squeeze)) for part in (asked, answered))
    length = 1 + shown * image_tokens + before + after
    return Lengths(length.astype(np.int32), shown, after.astype(np.int32))


def text_lengths(
    name: CorpusName, rng: np.random.Generator, shown: "np.ndarray[tuple[int], np.dtype[np.int32]]"
) -> "tuple[np.ndarray[tuple[int], np.dtype[np.float64]], np.ndarray[tuple[int], np.dtype[np.float64]]]":
    """Tokens that are asked and answered, of rows that show a picture (1) or none (0)."""
    count = len(shown)
    if name == "alignment":  # a short request and a caption
        return np.full(count, 20.0), np.clip(rng.lognormal(2.5, 0.5, count), 5, 80)
    pictured, plain = rng.lognormal(5.0, 0.7, count), rng.lognormal(6.0, 0.8, count)
    text = np.where(shown == 1, np.clip(pictured, 20, 1400), np.clip(plain, 20, 2000))
    answered = text * rng.uniform(0.15, 0.75, count)
    return text - answered, answered


@dataclass(frozen=True)
class Workload:
    """A training stage: a corpus, and how the recipe goes through it."""

    model: Trained
    training: Training
    corpus: CorpusSize
    seed: int

    @cached_property
    def plan(self) -> EpochPlan:
        """Its steps."""
        training = self.training
        return EpochPlan(
            len(self.corpus.lengths), training.global_batch, training.epochs, self.seed, training.max_steps
        )

    @cached_property
    def longest(self) -> int:
        """The longest sample, in tokens."""
        return int(self.corpus.lengths.length.max())

    @cached_property
    def _sampled(self) -> "list[np.ndarray[tuple[int], np.dtype[np.int64]]]":
        return self.sampled(_SAMPLED_STEPS)

    def sampled(self, most: int) -> "list[np.ndarray[tuple[int], np.dtype[np.int64]]]":
        """The samples of some steps, evenly over the run."""
        count = min(self.plan.steps, most)
        first = np.linspace(0, self.plan.steps - 1, count).astype(int)
        return [next(self.plan.from_step(int(number))).samples for number in first]

    def tokens(self) -> float:
        """Of a step, the mean."""
        return float(np.mean([self.corpus.lengths.length[step].sum() for step in self._sampled]))

    def step_flops(self) -> StepFlops:
        """Of all ranks in a step: of the first sampled one scaled to the mean of their tokens."""
        flops = [self._flops(step.tolist()) for step in self._sampled]
        return flops[int(np.argsort([one.total for one in flops])[len(flops) // 2])]

    def work(self, world_size: int) -> Callable[[int], Work]:
        """A step's work by the size of packs, on the rank that has most to do, a mean over steps."""

        def at(pack_tokens: int) -> Work:
            ranks = [assign(step, self.corpus.lengths.length, world_size, pack_tokens) for step in self._sampled]
            found = [self.slowest(one) for one in ranks]
            packs, flops, forward = (float(np.mean([one[part] for one in found])) for part in range(3))
            load = fullest(self.corpus.lengths, pack_tokens, self.training.global_batch)
            images = self.corpus.images / len(self.corpus.lengths) * self.training.global_batch / world_size
            return Work(load, packs, flops, forward, images)

        return at

    def slowest(self, ranks: list[list[Pack]]) -> tuple[int, float, float]:
        """Of one step's packs by rank: how many each has; FLOPs of the rank with most, and its body's forward."""
        flops = [self._flops([sample for pack in packs for sample in pack]) for packs in ranks]
        most = max(flops, key=lambda one: one.total)
        return len(ranks[0]), most.total, most.body.forward

    def _flops(self, samples: list[int]) -> StepFlops:
        lengths = self.corpus.lengths
        return step_flops(
            self.model.shape,
            [int(length) for length in lengths.length[samples]],
            int(lengths.images[samples].sum()),
            int(lengths.supervised[samples].sum()),
            self.model.language,
            self.model.vision,
        )
