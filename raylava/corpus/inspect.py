"""Inspects a prepared corpus: statistics, and a self-contained HTML page of samples as the model sees them.

Reads an artifact without changing it.
"""

import base64
import html
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from raylava.corpus.block_cache import open_blocks
from raylava.corpus.blocks import QUARANTINE, Manifest, Sample, decode_quarantine
from raylava.corpus.quarantine import QuarantinedRow
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
    cards = "".join(
        f"<div><b>{value:,}</b><span>{html.escape(name)}</span></div>" for name, value in statistics.items()
    )
    share = f"{manifest.loss_tokens / manifest.tokens:.1%} of all tokens count in the loss."
    return _PAGE.format(
        title=html.escape(title),
        statistics=cards,
        share=share,
        histogram=_histogram_bars(inspection.histogram),
        samples="".join(_sample_article(sample, tokenizer) for sample in inspection.samples),
        quarantine=_quarantine_table(inspection),
    )


def _histogram_bars(histogram: tuple[tuple[int, int, int], ...]) -> str:
    highest = max(count for *_, count in histogram)
    return "".join(
        f'<div class="bar"><i style="height:{100 * count / highest:.1f}%" title="{low}–{high - 1} tokens: {count}"></i>'
        f"<small>{low}</small></div>"
        for low, high, count in histogram
    )


def _sample_article(sample: Sample, tokenizer: "PreTrainedTokenizerBase") -> str:
    images = "".join(
        f'<img alt="image {number}" src="data:image;base64,{base64.b64encode(content).decode()}">'
        for number, content in enumerate(sample.images)
    )
    return (
        f"<article><header>{html.escape(sample.sample_id)}<small>{sample.length} tokens, {sample.loss_tokens} "
        f"in the loss</small></header>{images}<pre>{_marked_text(sample, tokenizer)}</pre></article>"
    )


def _marked_text(sample: Sample, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the conversation with its control tokens as escaped HTML; the tokens that the loss covers are marked."""
    parts, position = [], 0
    for start, stop in sample.loss_spans:
        parts.append(html.escape(tokenizer.decode(sample.input_ids[position:start])))
        parts.append(f"<mark>{html.escape(tokenizer.decode(sample.input_ids[start:stop]))}</mark>")
        position = stop
    parts.append(html.escape(tokenizer.decode(sample.input_ids[position:])))
    return "".join(parts)


def _quarantine_table(inspection: Inspection) -> str:
    if not inspection.quarantine:
        return "<p>No row was quarantined or filtered out.</p>"
    counts = "".join(
        f"<li>{html.escape(source)}: {', '.join(f'{rows:,} {html.escape(reason)}' for reason, rows in reasons.items())}"
        "</li>"
        for source, reasons in inspection.quarantined_by_source.items()
    )
    rows = "".join(
        f"<tr><td>{row.row}</td><td>{html.escape(row.sample_id)}</td><td>{html.escape(row.source)}</td>"
        f"<td>{html.escape(row.image)}</td><td>{html.escape(row.reason)}</td><td>{html.escape(row.detail)}</td></tr>"
        for row in inspection.quarantine[:_MAX_QUARANTINE_ROWS]
    )
    more = len(inspection.quarantine) - _MAX_QUARANTINE_ROWS
    rest = f"<p>and {more:,} more in quarantine.csv</p>" if more > 0 else ""
    head = "<tr><th>row</th><th>id</th><th>source</th><th>image</th><th>reason</th><th>detail</th></tr>"
    return f"<ul>{counts}</ul><table>{head}{rows}</table>{rest}"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
  :root {{ --ink: #1d1d22; --pale: #6b6b76; --line: #dfdfe6; --mark: #d9f2df; --bar: #5b7fd6 }}
  body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); margin: 3rem auto; max-width: 72rem }}
  h1 {{ margin-bottom: 0 }} h2 {{ margin: 2.5rem 0 .75rem }}
  .statistics {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem }}
  .statistics div {{ border: 1px solid var(--line); border-radius: .6rem; padding: .6rem .9rem }}
  .statistics b {{ display: block; font-size: 1.25rem }}
  small, .statistics span {{ color: var(--pale); font-size: .82rem }}
  .histogram {{ display: flex; align-items: flex-end; gap: .25rem; height: 11rem }}
  .bar {{ flex: 1; height: 100%; display: flex; flex-direction: column; justify-content: flex-end }}
  .bar small {{ text-align: center }}
  .bar i {{ background: var(--bar); border-radius: .25rem .25rem 0 0; min-height: 1px; display: block }}
  .samples {{ columns: 20rem; column-gap: 1rem }}
  article {{ break-inside: avoid; border: 1px solid var(--line); border-radius: .6rem; margin: 0 0 1rem }}
  article header {{ padding: .6rem .9rem; font-weight: 600; overflow-wrap: anywhere }}
  article header small {{ display: block; font-weight: 400 }}
  article img {{ width: 100%; display: block; image-rendering: pixelated }}
  pre {{ margin: 0; padding: .75rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem }}
  mark {{ background: var(--mark); border-radius: .2rem; padding: .05rem .1rem }}
  table {{ border-collapse: collapse; width: 100%; font-size: .88rem }}
  th, td {{ text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere }}
</style>
<h1>{title}</h1>
<p>{share}</p>
<div class="statistics">{statistics}</div>
<h2>Length in tokens</h2>
<div class="histogram">{histogram}</div>
<h2>Samples as the model sees them</h2>
<p>Images at the backbone's resolution; the loss covers the <mark>marked</mark> tokens.</p>
<div class="samples">{samples}</div>
<h2>Quarantine</h2>
{quarantine}
</html>
"""
