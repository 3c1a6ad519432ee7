"""The computation of a training stage: the lengths of its samples and the steps they form.

Lengths are read from a prepared corpus, or drawn from stated assumptions if there is none. No weights or images are
needed.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa

from raylava.config.recipe import Corpus, Training
from raylava.corpus.blocks import LENGTHS, MANIFEST, Lengths, decode_lengths, read_manifest
from raylava.errors import UserError, first_line
from raylava.perf.memory import TrainableModel
from raylava.storage import StoragePath
from raylava.train.batch_plan import BatchPlan, plan_batches
from raylava.train.sampled_steps import SampledSteps, sample_steps

CorpusName = Literal["alignment", "instruction"]

# Rows of LLaVA's own annotation files, and the fraction of rows with an image (LLaVA-1.5's dataset cards).
_KNOWN_ROWS = {"blip_laion_cc_sbu_558k.json": 558_128, "llava_v1_5_mix665k.json": 665_298}
_IMAGE_FRACTION: dict[CorpusName, float] = {"alignment": 1.0, "instruction": 624_610 / 665_298}
_MAX_DRAWN_ROWS = 50_000  # lengths are drawn for at most this many rows, which represent the others
_JPEG_BYTES_PER_PIXEL = 0.7  # at quality 95
_SAMPLED_STEPS = 24


@dataclass(frozen=True)
class CorpusSize:
    """The size of a corpus as training sees it.

    `rows` counts samples; `lengths` covers all of them or a drawn subset; `bytes` is the size of the blocks; `source`
    describes the origin of these values; `is_prepared` tells whether the blocks exist.
    """

    rows: int
    lengths: Lengths
    bytes: float
    source: str
    is_prepared: bool

    @property
    def images(self) -> float:
        """Images of all samples together."""
        return float(self.lengths.images.mean()) * self.rows


def prepared_corpus(folder: StoragePath) -> CorpusSize:
    """Read the size of a prepared corpus. Raises UserError if `folder` has no prepared corpus."""
    if not (folder / MANIFEST).exists():
        raise UserError(f"--corpus {folder}: no prepared corpus there; make one with `raylava run --only prepare`")
    manifest = read_manifest(folder)
    try:
        lengths = decode_lengths((folder / LENGTHS).read_bytes())
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UserError(
            f"--corpus {folder}: {LENGTHS} is missing or damaged ({first_line(error)}); prepare the corpus again"
        ) from error
    size = float(sum(block.bytes for block in manifest.blocks))
    return CorpusSize(len(lengths), lengths, size, f"prepared, {folder}", is_prepared=True)


def assumed_corpus(name: CorpusName, corpus: Corpus, image_tokens: int, pixels: int, rows: int | None) -> CorpusSize:
    """Return the assumed size of a corpus that is not prepared, with lengths distributed as in LLaVA's corpora.

    `rows` defaults to the row counts of LLaVA's own files; lengths are truncated at the recipe's `max_length`;
    `pixels` is the side of a stored image. Raises UserError if `rows` is None and a source is not one of LLaVA's files.
    """
    count = rows if rows is not None else _known_rows(name, corpus)
    lengths = _draw_lengths(name, min(count, _MAX_DRAWN_ROWS), image_tokens, corpus.max_length)
    images_per_row = float(lengths.images.mean())
    text_bytes = 5.0 * (float(lengths.length.mean()) - images_per_row * image_tokens)  # token ids and list offsets
    return CorpusSize(
        count,
        lengths,
        count * (text_bytes + _JPEG_BYTES_PER_PIXEL * pixels**2 * images_per_row),
        f"assumed: {count:,} rows with lengths like those of LLaVA's {name} data",
        is_prepared=False,
    )


def _known_rows(name: CorpusName, corpus: Corpus) -> int:
    total = 0.0
    for source in corpus.sources:
        rows = _KNOWN_ROWS.get(source.annotations.rpartition("/")[2])
        if rows is None:
            raise UserError(
                f"corpora.{name}: {source.annotations} is not prepared and its number of rows is unknown; "
                f"add --rows {name}=N, or --corpus {name}=PATH of a corpus prepared by `raylava run --only prepare`"
            )
        total += min(rows, source.max_rows or rows) * source.sampling_weight
    return max(1, round(total))


def _draw_lengths(name: CorpusName, count: int, image_tokens: int, max_length: int) -> Lengths:
    """Draw lognormal lengths with parameters estimated for LLaVA's corpora.

    The text is scaled down to the tokens that `max_length` leaves beside an image.
    """
    rng = np.random.default_rng(0)
    has_image = (rng.random(count) < _IMAGE_FRACTION[name]).astype(np.int32)
    prompt, response = text_lengths(name, rng, has_image)
    max_text = max_length - 1 - has_image * image_tokens
    scale = np.minimum(1.0, max_text / (prompt + response))
    prompt, response = (np.maximum(1, np.floor(tokens * scale)) for tokens in (prompt, response))
    length = 1 + has_image * image_tokens + prompt + response
    return Lengths(length.astype(np.int32), has_image, response.astype(np.int32))


def text_lengths(
    name: CorpusName, rng: np.random.Generator, has_image: "np.ndarray[tuple[int], np.dtype[np.int32]]"
) -> "tuple[np.ndarray[tuple[int], np.dtype[np.float64]], np.ndarray[tuple[int], np.dtype[np.float64]]]":
    """Return the prompt tokens and the response tokens of rows with an image (1) or without (0)."""
    count = len(has_image)
    if name == "alignment":  # a short request and a caption
        return np.full(count, 20.0), np.clip(rng.lognormal(2.5, 0.5, count), 5, 80)
    with_image, text_only = rng.lognormal(5.0, 0.7, count), rng.lognormal(6.0, 0.8, count)
    text = np.where(has_image == 1, np.clip(with_image, 20, 1400), np.clip(text_only, 20, 2000))
    response = text * rng.uniform(0.15, 0.75, count)
    return text - response, response


@dataclass(frozen=True)
class Workload:
    """A training stage: its model, its settings and its corpus."""

    model: TrainableModel
    training: Training
    corpus: CorpusSize
    seed: int

    @cached_property
    def plan(self) -> BatchPlan:
        """The batch plan over all rows of the corpus."""
        return self._plan(self.corpus.rows)

    @cached_property
    def longest_sample(self) -> int:
        """Length of the longest sample, in tokens."""
        return int(self.corpus.lengths.length.max())

    @cached_property
    def sampled_steps(self) -> SampledSteps:
        """A sample of the stage's steps, over the rows whose lengths are known."""
        steps = sample_steps(self.plan_of_known_lengths, _SAMPLED_STEPS)
        return SampledSteps(self.model, self.corpus.lengths, steps, self.training.global_batch_size)

    @property
    def plan_of_known_lengths(self) -> BatchPlan:
        """The batch plan over the rows whose lengths are known, which may be fewer than all."""
        return plan_batches(self.training, self.seed, self.corpus.lengths)

    def _plan(self, samples: int) -> BatchPlan:
        training = self.training
        return BatchPlan(samples, training.global_batch_size, training.epochs, self.seed, training.max_steps)
