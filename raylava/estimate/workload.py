"""What a training stage has to compute: the lengths of its samples, and the steps that they form.

Read from a prepared corpus, or drawn by stated assumptions where there is none. No weights, no images.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from raylava.config.recipe import Corpus, Training
from raylava.corpus.blocks import LENGTHS, MANIFEST, Lengths, Manifest, read_lengths
from raylava.errors import UserError
from raylava.perf.memory import TrainableModel
from raylava.storage import StoragePath
from raylava.train.batch_plan import BatchPlan
from raylava.train.sampled_steps import SampledSteps, sample_steps

CorpusName = Literal["alignment", "instruction"]

# Rows of LLaVA's own files, and the share of them with a image (LLaVA-1.5's dataset cards).
_KNOWN_ROWS = {"blip_laion_cc_sbu_558k.json": 558_128, "llava_v1_5_mix665k.json": 665_298}
_SHOWN: dict[CorpusName, float] = {"alignment": 1.0, "instruction": 624_610 / 665_298}
_DRAWN = 50_000  # lengths are drawn for so many rows at most
_JPEG_BYTES = 0.7  # a pixel, at quality 95
_SAMPLED_STEPS = 24


@dataclass(frozen=True)
class CorpusSize:
    """A corpus as training sees it: `rows` samples, lengths of all of them or of as many as were drawn, bytes of its
    blocks, where that is from, and whether it is prepared.
    """

    rows: int
    lengths: Lengths
    bytes: float
    source: str
    is_prepared: bool

    @property
    def images(self) -> float:
        """Images of all samples."""
        return float(self.lengths.images.mean()) * self.rows


def prepared(place: StoragePath) -> CorpusSize:
    """What lies in a prepared corpus. Raises UserError where there is none."""
    try:
        manifest = Manifest.from_json((place / MANIFEST).read_bytes())
        lengths = read_lengths((place / LENGTHS).read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"--corpus {place}: no prepared corpus there; make one with `raylava run --only prepare`"
        ) from error
    size = float(sum(block.bytes for block in manifest.blocks))
    return CorpusSize(len(lengths), lengths, size, f"prepared, {place}", is_prepared=True)


def assumed(name: CorpusName, corpus: Corpus, image_tokens: int, pixels: int, rows: int | None) -> CorpusSize:
    """A corpus like LLaVA's: its known rows (or so many), lengths drawn like theirs and cut at the recipe's longest.

    Raises UserError for files that are not LLaVA's when `rows` is not given.
    """
    count = rows if rows is not None else _known_rows(name, corpus)
    lengths = _draw(name, min(count, _DRAWN), image_tokens, corpus.max_length)
    shown = float(lengths.images.mean())
    text = 5.0 * (float(lengths.length.mean()) - shown * image_tokens)  # ids and their lists
    return CorpusSize(
        count,
        lengths,
        count * (text + _JPEG_BYTES * pixels**2 * shown),
        f"assumed: {count:,} rows with lengths like those of LLaVA's {name} data",
        is_prepared=False,
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
        total += min(rows, source.max_rows or rows) * source.sampling_weight
    return max(1, round(total))


def _draw(name: CorpusName, count: int, image_tokens: int, longest: int) -> Lengths:
    """Lognormal lengths; the parameters are estimates of LLaVA's. Text gets what `longest` leaves beside a image."""
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
    """Tokens that are asked and answered, of rows that show a image (1) or none (0)."""
    count = len(shown)
    if name == "alignment":  # a short request and a caption
        return np.full(count, 20.0), np.clip(rng.lognormal(2.5, 0.5, count), 5, 80)
    with_image, text_only = rng.lognormal(5.0, 0.7, count), rng.lognormal(6.0, 0.8, count)
    text = np.where(shown == 1, np.clip(with_image, 20, 1400), np.clip(text_only, 20, 2000))
    answered = text * rng.uniform(0.15, 0.75, count)
    return text - answered, answered


@dataclass(frozen=True)
class Workload:
    """A training stage: a corpus, and how the recipe goes through it."""

    model: TrainableModel
    training: Training
    corpus: CorpusSize
    seed: int

    @cached_property
    def plan(self) -> BatchPlan:
        """Its steps."""
        return self._plan(self.corpus.rows)

    @cached_property
    def longest(self) -> int:
        """The longest sample, in tokens."""
        return int(self.corpus.lengths.length.max())

    @cached_property
    def sampled(self) -> SampledSteps:
        """Some of its steps, of the samples whose lengths are known."""
        steps = sample_steps(self.plan_of_known, _SAMPLED_STEPS)
        return SampledSteps(self.model, self.corpus.lengths, steps, self.training.global_batch_size)

    @property
    def plan_of_known(self) -> BatchPlan:
        """The plan over samples whose lengths are known, should these be fewer than there are."""
        return self._plan(len(self.corpus.lengths))

    def _plan(self, samples: int) -> BatchPlan:
        training = self.training
        return BatchPlan(samples, training.global_batch_size, training.epochs, self.seed, training.max_steps)
