"""Prepared corpora in a report: counts, lengths, and a few samples as the model sees them."""

from typing import Any

from raylava.artifacts import Artifact
from raylava.corpus.blocks import TOKENIZER
from raylava.corpus.inspect import histogram_edges, inspect_corpus, view_sample
from raylava.local_copies import local_copy

_SAMPLES = 4
_COUNTS = {
    "rows_in": "rows in the source",
    "rows": "samples",
    "quarantined": "quarantined",
    "filtered": "filtered",
    "truncated": "truncated",
    "images": "images",
    "tokens": "tokens",
    "loss_tokens": "loss tokens",
}


def corpus_data(label: str, artifact: Artifact, images: dict[str, str]) -> dict[str, Any]:
    """Return the figures of a prepared corpus. `images` receives the data URIs of the samples' images by name."""
    from transformers import AutoTokenizer

    inspection = inspect_corpus(artifact.path, _SAMPLES, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(local_copy(artifact.path / TOKENIZER), trust_remote_code=False)
    samples = []
    for sample in (view_sample(sample, tokenizer) for sample in inspection.samples):
        names = [f"{artifact.fingerprint}/{sample.sample_id}/{number}" for number in range(len(sample.images))]
        images.update(zip(names, sample.images, strict=True))
        samples.append(
            {
                "sample_id": sample.sample_id,
                "length": sample.length,
                "loss_tokens": sample.loss_tokens,
                "segments": [vars(segment) for segment in sample.segments],
                "images": names,
            }
        )
    return {
        "label": label,
        "counts": [
            {"name": name, "value": getattr(inspection.manifest, key)}
            for key, name in _COUNTS.items()
            if key not in ("filtered", "truncated") or getattr(inspection.manifest, key)
        ],
        "bytes": sum(block.bytes for block in inspection.manifest.blocks),
        "edges": histogram_edges(inspection.histogram),
        "histogram": [count for *_, count in inspection.histogram],
        "quarantine": inspection.quarantined_by_source,
        "samples": samples,
    }
