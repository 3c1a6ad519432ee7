"""Prepares a corpus: source rows to Arrow blocks, with Ray Data.

    annotations ──stage_rows──▶ shards (references to rows) ──Ray Data: make_block per shard──▶ block, lengths,
                                                                                  quarantined rows, record
    records ──publish_corpus──▶ lengths.arrow, quarantine.csv, tokenizer/, manifest.json

The worker that handles a shard reads its rows and images, and writes its block to storage itself: no image passes
through the object store, and memory holds only the blocks in flight. Shards are cut by row count alone, so the same
corpus gives the same bytes at any parallelism. A block is complete once its record, which is written last, exists; a
second run prepares only the missing blocks.
"""

import functools
import gc
import hashlib
import itertools
import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from raylava.cluster.gauges import Gauges
from raylava.cluster.nodes import eventual_resources, matching_resources, startable_node_types
from raylava.cluster.session import error_summary
from raylava.config.recipe import Corpus
from raylava.corpus.blocks import (
    FETCHED,
    LENGTHS,
    MANIFEST,
    QUARANTINE,
    SCHEMA_VERSION,
    TOKENIZER,
    BlockRecord,
    Lengths,
    Manifest,
    Sample,
    concatenate_lengths,
    count_reasons,
    decode_lengths,
    decode_quarantine,
    encode_block,
    encode_lengths,
    encode_quarantine,
    sample_lengths,
)
from raylava.corpus.conversation import ChatTokenizer
from raylava.corpus.fetch import UrlFetcher, is_url
from raylava.corpus.quarantine import BadRow, QuarantinedRow, Reason, describe_error
from raylava.corpus.samples import make_sample
from raylava.corpus.sources import SelectedRow, SourceFiles, image_names, parse_row, sample_id
from raylava.errors import RunError, UserError
from raylava.models.registry import LanguageSpec, VisionSpec, load_tokenizer
from raylava.progress import ProgressBar
from raylava.storage import StoragePath, storage_path

_SHARDS = "rows"  # folder of the staged rows and records; deleted once the manifest is written
_INDEX = "index.json"
_FETCHED_TOGETHER = 256  # rows whose images are fetched at the same time, and held in memory
_THREADS = 16  # on the driver, that read and write small files

T = TypeVar("T")


@dataclass(frozen=True)
class PrepareSpec:
    """All inputs of `make_block`; small, and identical on every node.

    `name` is the corpus's name in the recipe; `source_paths` has absolute paths or URIs, of annotations and images, per
    source; `output` is the path or URI of the artifact.
    """

    name: str
    corpus: Corpus
    source_paths: tuple[tuple[str, str], ...]
    language: LanguageSpec
    vision: VisionSpec
    output: str

    @property
    def sources(self) -> list[SourceFiles]:
        """The sources of the corpus with their files."""
        return [
            SourceFiles(source, *paths) for source, paths in zip(self.corpus.sources, self.source_paths, strict=True)
        ]


def prepare(spec: PrepareSpec, tokenizer: str, bar: ProgressBar, node_labels: dict[str, str] | None = None) -> Manifest:
    """Prepare the missing blocks with Ray Data, then publish the corpus.

    `tokenizer` is the tokenizer's fingerprint for the manifest; `node_labels` select the nodes to use. Raises UserError
    for sources that cannot be read and when more rows are quarantined than `quarantine_limit` allows, RunError when a
    worker fails.
    """
    output = storage_path(spec.output)
    rows_in, shards = stage_rows(spec, output)
    monitor = _QuarantineMonitor(spec, rows_in, output)
    complete = _complete_shards(output, shards)
    for record in _in_parallel(functools.partial(_read_record, output), complete):
        monitor.add(record)
    gauges = Gauges(output.name, "prepare")
    bar.update(monitor.rows, rows_in, quarantined=monitor.quarantined)
    missing = sorted(set(range(shards)) - set(complete))
    for record in _make_blocks(spec, missing, node_labels or {}):
        monitor.add(record)
        bar.update(monitor.rows, rows_in, quarantined=monitor.quarantined)
        gauges.set(rows=monitor.rows, quarantined_rows=monitor.quarantined)
    return publish_corpus(spec, output, shards, rows_in, tokenizer)


def stage_rows(spec: PrepareSpec, output: StoragePath) -> tuple[int, int]:
    """Split the selected rows into shards of `samples_per_block` rows and return (rows, shards).

    A shard holds references to rows, not the rows: this scans the annotations once and copies nothing. When the shards
    are already staged, it only returns their counts. Raises UserError when no row is selected.
    """
    index = output / _SHARDS / _INDEX
    if index.exists():
        counts = json.loads(index.read_bytes())
        return counts["rows"], counts["shards"]
    rows = shards = 0
    with ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="write-shard") as pool:
        writes: deque[Future[None]] = deque()
        for shard, lines in enumerate(_shard_lines(spec)):
            writes.append(pool.submit(_shard_path(output, shard).write_bytes, b"\n".join(lines)))
            rows += len(lines)
            shards += 1
            if len(writes) > 2 * _THREADS:  # bounds the memory
                writes.popleft().result()
        for write in writes:
            write.result()
    if not rows:
        raise UserError(f"corpora.{spec.name}: no row is selected; relax include, exclude or max_rows of its sources")
    index.write_bytes(json.dumps({"rows": rows, "shards": shards}).encode())
    return rows, shards


def _shard_lines(spec: PrepareSpec) -> Iterator[list[bytes]]:
    """Yield the lines of each shard's file, one selected row per line."""
    lines: list[bytes] = []
    for number, source in enumerate(spec.sources):
        for row in source.selected_rows(number):
            lines.append(json.dumps(astuple(row)).encode())
            if len(lines) == spec.corpus.samples_per_block:
                yield lines
                lines = []
    if lines:
        yield lines


def _make_blocks(spec: PrepareSpec, shards: list[int], node_labels: dict[str, str]) -> Iterator[BlockRecord]:
    """Run `make_block` for the shards on Ray Data actors; yield the records in the order of completion."""
    if not shards:
        return
    import ray.data

    dataset: ray.data.Dataset = ray.data.from_items(
        [{"shard": shard} for shard in shards], override_num_blocks=len(shards)
    )
    # Actors rather than tasks: each has a second shard queued, so that none idles for Ray Data's scheduling interval
    # (0.2 s per shard).
    workers = max(1, min(len(shards), int(matching_resources(node_labels).get("CPU", 0))))
    eventual_workers = int(eventual_resources(node_labels).get("CPU", 0))
    # Without a maximum, Ray Data asks the autoscaler for nodes of any type.
    max_workers = None if startable_node_types() is None else max(workers, eventual_workers)
    pool = ray.data.ActorPoolStrategy(
        min_size=1, initial_size=workers, max_size=max_workers, max_tasks_in_flight_per_actor=2
    )
    results = dataset.map(_BlockWriter, fn_constructor_args=(spec,), compute=pool, label_selector=node_labels or None)
    for result in results.iter_rows():
        if result["error"]:
            raise RunError(f"preparing corpora.{spec.name} failed: {result['error']}")
        yield BlockRecord(**json.loads(result["record"]))


class _BlockWriter:
    """Ray Data actor that maps a shard number to the record of its block."""

    def __init__(self, spec: PrepareSpec) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # an actor has one CPU
        self._spec = spec
        _chat_tokenizer(spec.language)
        gc.freeze()  # objects created by importing torch and transformers are permanent; do not scan them again

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        try:
            return {"record": json.dumps(asdict(make_block(self._spec, int(row["shard"])))), "error": ""}
        except Exception as error:
            return {"record": "", "error": error_summary(error)}


def make_block(spec: PrepareSpec, shard: int) -> BlockRecord:
    """Read the rows of one shard and write its block, lengths, quarantined rows and, last, its record."""
    output = storage_path(spec.output)
    content = _BlockContent()
    chat_tokenizer, fetcher = _chat_tokenizer(spec.language), UrlFetcher(spec.corpus.fetch)
    rows = _read_shard(spec, output, shard)
    while batch := list(itertools.islice(rows, _FETCHED_TOGETHER)):
        fetched = fetcher.fetch_all(name for *_, raw in batch for name in image_names(raw) if is_url(name))
        content.fetched += [image.record() for image in fetched.values()]
        for row, file, image_root, raw in batch:
            try:
                parsed = parse_row(raw, row.id_suffix)
                sample, truncated = make_sample(parsed, image_root, chat_tokenizer, spec.corpus, spec.vision, fetched)
                content.samples.append(sample)
                content.truncated += truncated
            except BadRow as bad:
                name = sample_id(raw, row.id_suffix)
                content.quarantined.append(QuarantinedRow(row.row, name, file.name, bad.reason, bad.detail))
            except (OSError, MemoryError):  # storage and memory concern more than this row
                raise
            except Exception as error:
                name = sample_id(raw, row.id_suffix)
                detail = describe_error(error)
                content.quarantined.append(QuarantinedRow(row.row, name, file.name, Reason.FAILED, detail))
    return _write_block(output, shard, content)


@dataclass
class _BlockContent:
    """The samples and the quarantined rows of one shard; `truncated` counts truncated samples.

    `fetched` are JSON lines about the images that were fetched, see FetchedImage.record.
    """

    samples: list[Sample] = field(default_factory=list)
    quarantined: list[QuarantinedRow] = field(default_factory=list)
    truncated: int = 0
    fetched: list[bytes] = field(default_factory=list)


def _read_shard(
    spec: PrepareSpec, output: StoragePath, shard: int
) -> Iterator[tuple[SelectedRow, StoragePath, StoragePath, Any]]:
    """Yield (selected row, its file, its image folder, raw row) for a shard; rows of one file are read together."""
    rows = [SelectedRow(*json.loads(line)) for line in _shard_path(output, shard).read_bytes().splitlines()]
    sources = spec.sources
    for (source_number, file_number), group in itertools.groupby(rows, key=lambda row: (row.source, row.file)):
        source, rows_of_file = sources[source_number], list(group)
        file, image_root = source.files[file_number], storage_path(source.images)
        raw_rows = source.format(file).read_rows(file, [row.offset for row in rows_of_file])
        for row, raw in zip(rows_of_file, raw_rows, strict=True):
            yield row, file, image_root, raw


@functools.cache
def _chat_tokenizer(language: LanguageSpec) -> ChatTokenizer:
    """Return a tokenizer that is loaded once per process: loading Gemma's takes longer than tokenizing many rows."""
    return ChatTokenizer(load_tokenizer(language), language.template)


def _write_block(output: StoragePath, shard: int, content: _BlockContent) -> BlockRecord:
    path = f"blocks/block-{shard:05d}.arrow"
    block = encode_block(content.samples)
    (output / path).write_bytes(block)
    _lengths_path(output, shard).write_bytes(encode_lengths(sample_lengths(content.samples)))
    _quarantine_path(output, shard).write_bytes(encode_quarantine(content.quarantined))
    fetched = b"".join(content.fetched)
    if fetched:
        (output / FETCHED / f"images-{shard:05d}.jsonl").write_bytes(fetched)
    record = BlockRecord(
        path=path,
        rows=len(content.samples),
        quarantined=len(content.quarantined),
        truncated=content.truncated,
        bytes=len(block),
        sha256=hashlib.sha256(block).hexdigest(),
        fetched=len(content.fetched),
        fetched_sha256=hashlib.sha256(fetched).hexdigest() if fetched else "",
    )
    _record_path(output, shard).write_bytes(json.dumps(asdict(record)).encode())
    return record


def publish_corpus(spec: PrepareSpec, output: StoragePath, shards: int, rows_in: int, tokenizer: str) -> Manifest:
    """Merge the results of all shards into the files of a prepared corpus; the manifest is written last.

    Deletes the staged rows. Raises UserError when every row is quarantined.
    """
    records = list(_in_parallel(functools.partial(_read_record, output), range(shards)))
    lengths = concatenate_lengths(_in_parallel(functools.partial(_read_lengths, output), range(shards)))
    parts = _in_parallel(functools.partial(_read_quarantine, output), range(shards))
    quarantine = [row for part in parts for row in part]
    if not len(lengths):
        raise UserError(
            f"corpora.{spec.name}: every row was quarantined; see {output / _SHARDS}/quarantine*.csv, "
            "then fix the corpus"
        )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        tokenizer=tokenizer,
        pixels=spec.vision.fingerprint_fields(),
        blocks=tuple(records),
        rows_in=rows_in,
        rows=len(lengths),
        tokens=int(lengths.length.sum()),
        loss_tokens=int(lengths.loss_tokens.sum()),
        images=int(lengths.images.sum()),
        truncated=sum(record.truncated for record in records),
        quarantined=len(quarantine),
        quarantine=count_reasons(quarantine),
    )
    assert manifest.rows + manifest.quarantined == rows_in, "a source row was lost"
    output.remove_partial_files()
    _save_tokenizer(spec, output)
    (output / LENGTHS).write_bytes(encode_lengths(lengths))
    (output / QUARANTINE).write_bytes(encode_quarantine(quarantine))
    (output / MANIFEST).write_bytes(manifest.to_json())
    (output / _SHARDS).delete()
    return manifest


def _save_tokenizer(spec: PrepareSpec, output: StoragePath) -> None:
    """Store the tokenizer with the blocks, so that they can be decoded without the language model."""
    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer(spec.language).save_pretrained(folder)
        (output / TOKENIZER).upload_folder(Path(folder))


class _QuarantineMonitor:
    """Counts rows as blocks complete, and stops the run as soon as too many rows are quarantined."""

    def __init__(self, spec: PrepareSpec, rows_in: int, output: StoragePath) -> None:
        self._spec, self._rows_in, self._output = spec, rows_in, output
        self.rows = self.quarantined = 0

    def add(self, record: BlockRecord) -> None:
        """Add the rows of a completed block. Raises UserError (see `check_quarantine`)."""
        self.rows += record.rows + record.quarantined
        self.quarantined += record.quarantined
        counts = {"rows_in": self._rows_in, "quarantined": self.quarantined}
        check_quarantine(counts, self._spec.name, self._spec.corpus, self._output / _SHARDS)


def check_quarantine(counts: dict[str, Any], name: str, corpus: Corpus, folder: StoragePath) -> None:
    """Raise UserError when more rows are quarantined than the recipe allows.

    `counts` has the keys `quarantined` and `rows_in`; `folder` is the location of the quarantine*.csv files.
    """
    quarantined, rows_in = counts["quarantined"], counts["rows_in"]
    if quarantined > corpus.quarantine_limit * rows_in:
        raise UserError(
            f"corpora.{name}: {quarantined} of {rows_in} rows were quarantined, more than quarantine_limit="
            f"{corpus.quarantine_limit:g} allows; see {folder}/quarantine*.csv, then fix the corpus or raise the limit"
        )


def _shard_path(output: StoragePath, shard: int) -> StoragePath:
    return output / _SHARDS / f"shard-{shard:05d}.jsonl"


def _lengths_path(output: StoragePath, shard: int) -> StoragePath:
    return output / _SHARDS / f"lengths-{shard:05d}.arrow"


def _quarantine_path(output: StoragePath, shard: int) -> StoragePath:
    return output / _SHARDS / f"quarantine-{shard:05d}.csv"


def _record_path(output: StoragePath, shard: int) -> StoragePath:
    return output / _SHARDS / f"record-{shard:05d}.json"


def _complete_shards(output: StoragePath, shards: int) -> list[int]:
    """Return the shards whose blocks are complete, by one listing."""
    names = {file.name for file in (output / _SHARDS).children()}
    return [shard for shard in range(shards) if _record_path(output, shard).name in names]


def _in_parallel(read: Callable[[int], T], shards: Sequence[int]) -> Iterator[T]:
    """Yield `read(shard)` in order; a store in the network answers many requests at the same time."""
    with ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="read-shard") as pool:
        yield from pool.map(read, shards)


def _read_record(output: StoragePath, shard: int) -> BlockRecord:
    return BlockRecord(**json.loads(_record_path(output, shard).read_bytes()))


def _read_lengths(output: StoragePath, shard: int) -> Lengths:
    return decode_lengths(_lengths_path(output, shard).read_bytes())


def _read_quarantine(output: StoragePath, shard: int) -> list[QuarantinedRow]:
    return decode_quarantine(_quarantine_path(output, shard).read_bytes())
