"""Inspects a prepared corpus: statistics, and a self-contained HTML page of samples as the model sees them.

Reads an artifact without changing it.
"""

import base64
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from raylava.corpus.block_cache import open_blocks
from raylava.corpus.blocks import QUARANTINE, Manifest, Sample, decode_quarantine
from raylava.corpus.quarantine import QuarantinedRow
from raylava.pages.charts import bar_heights
from raylava.pages.render import render
from raylava.storage import StoragePath

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HISTOGRAM_BINS = 16
_MAX_QUARANTINE_ROWS = 200  # in the page


@dataclass(frozen=True)
class Inspection:
    """Statistics of a corpus. `histogram` has (from, to, sample count) per range of lengths in expanded tokens."""

    manifest: Manifest
    histogram: tuple[tuple[int, int, int], ...]
    quarantined_by_source: dict[str, dict[str, int]]
    samples: tuple[Sample, ...]
    quarantine: tuple[QuarantinedRow, ...]


def inspect_corpus(artifact: StoragePath, sample_count: int, seed: int) -> Inspection:
    """Compute the statistics of a `prepare` artifact and draw up to `sample_count` of its samples, seeded by `seed`."""
    blocks = open_blocks(artifact)
    quarantine = decode_quarantine((artifact / QUARANTINE).read_bytes())
    by_source: dict[str, Counter[str]] = {}
    for row in quarantine:
        by_source.setdefault(row.source, Counter())[row.reason] += 1
    numbers = np.random.default_rng(seed).permutation(len(blocks))[:sample_count]
    return Inspection(
        blocks.manifest,
        _histogram(blocks.lengths.length),
        {source: dict(counts.most_common()) for source, counts in sorted(by_source.items())},
        tuple(blocks[int(number)] for number in sorted(numbers)),
        tuple(quarantine),
    )


def _histogram(lengths: "np.ndarray[tuple[int], np.dtype[np.int32]]") -> tuple[tuple[int, int, int], ...]:
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, _HISTOGRAM_BINS + 1).astype(int))
    counts, _ = np.histogram(lengths, edges)
    bins = zip(pairwise(edges), counts, strict=True)
    return tuple((int(low), int(high), int(count)) for (low, high), count in bins)


@dataclass(frozen=True)
class TextSegment:
    """A part of a conversation with its control tokens; `in_loss` if the loss covers it."""

    text: str
    in_loss: bool


@dataclass(frozen=True)
class SampleView:
    """A sample as it is displayed. `images` are data URIs."""

    sample_id: str
    length: int
    loss_tokens: int
    segments: tuple[TextSegment, ...]
    images: tuple[str, ...]


def page(inspection: Inspection, title: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Render the inspection as one self-contained HTML page. All text from the corpus is escaped."""
    manifest = inspection.manifest
    statistics = {
        "rows in the source": manifest.rows_in,
        "samples": manifest.rows,
        "quarantined": manifest.quarantined,
        "filtered": manifest.filtered,
        "truncated": manifest.truncated,
        "images": manifest.images,
        "tokens": manifest.tokens,
        "loss tokens": manifest.loss_tokens,
        "bytes": sum(block.bytes for block in manifest.blocks),
    }
    counts = [count for *_, count in inspection.histogram]
    return render(
        "corpus.html",
        title=title,
        statistics=statistics,
        loss_share=manifest.loss_tokens / manifest.tokens,
        edges=histogram_edges(inspection.histogram),
        counts=counts,
        heights=bar_heights(counts),
        samples=[view_sample(sample, tokenizer) for sample in inspection.samples],
        quarantined_by_source=inspection.quarantined_by_source,
        quarantine=inspection.quarantine[:_MAX_QUARANTINE_ROWS],
        more_rows=len(inspection.quarantine) - _MAX_QUARANTINE_ROWS,
    )


def histogram_edges(histogram: tuple[tuple[int, int, int], ...]) -> list[int]:
    """Return the edges between the ranges of a histogram, first and last included."""
    return [low for low, *_ in histogram] + [histogram[-1][1]]


def view_sample(sample: Sample, tokenizer: "PreTrainedTokenizerBase") -> SampleView:
    """Decode a sample's tokens, divided by whether the loss covers them, and encode its images as data URIs."""
    segments, position = [], 0
    for start, stop in sample.loss_spans:
        segments.append(TextSegment(tokenizer.decode(sample.input_ids[position:start]), in_loss=False))
        segments.append(TextSegment(tokenizer.decode(sample.input_ids[start:stop]), in_loss=True))
        position = stop
    segments.append(TextSegment(tokenizer.decode(sample.input_ids[position:]), in_loss=False))
    images = tuple(f"data:image;base64,{base64.b64encode(content).decode()}" for content in sample.images)
    return SampleView(sample.sample_id, sample.length, sample.loss_tokens, tuple(segments), images)
