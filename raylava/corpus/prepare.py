"""Prepares a corpus: source rows to Arrow blocks, with Ray Data.

    annotations ──stage_rows──▶ shards (references to rows) ──write_shard_keys, find_partition──▶ duplicates
    shards, duplicates ──make_block──▶ block, lengths, quarantined rows, record of each shard
    records ──publish_corpus──▶ lengths.arrow, quarantine.csv, tokenizer/, manifest.json

Each arrow is a pass of Ray Data over the shards; duplicates are searched once for each de-duplication operator. The
blocks of a corpus have the same bytes at any parallelism. A second run does only what is missing.
"""

import functools
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raylava.artifacts import publish_folder
from raylava.cluster.gauges import Gauges
from raylava.config.recipe import Corpus
from raylava.corpus.block_writer import benchmark_hashes_file, load_once, make_block, write_shard_keys
from raylava.corpus.blocks import (
    LENGTHS,
    MANIFEST,
    QUARANTINE,
    SCHEMA_VERSION,
    TOKENIZER,
    BlockRecord,
    Lengths,
    Manifest,
    concatenate_lengths,
    decode_lengths,
    decode_quarantine,
    encode_lengths,
    encode_quarantine,
)
from raylava.corpus.crashes import reset_attempts
from raylava.corpus.deduplication import duplicates_kind, find_partition, keys_kind
from raylava.corpus.image_hash import difference_hash
from raylava.corpus.operator_library import DECONTAMINATE, load_operators
from raylava.corpus.parallel import Function, MapOnCluster, map_with_ray_data
from raylava.corpus.quarantine import BadRow
from raylava.corpus.row_index import RowIndexes
from raylava.corpus.shards import (
    SHARDS,
    PrepareSpec,
    existing_shards,
    in_parallel,
    key_partitions,
    shard_file,
    stage_rows,
)
from raylava.errors import UserError
from raylava.models.registry import load_tokenizer
from raylava.progress import ProgressBar
from raylava.storage import StoragePath, storage_path

logger = logging.getLogger(__name__)

_IMAGES_PER_TASK = 256


@dataclass(frozen=True)
class ImageFolder:
    """Images by their names below a folder, given as path or URI."""

    root: str
    names: Sequence[str]


def prepare(
    spec: PrepareSpec,
    tokenizer: str,
    bar: ProgressBar,
    node_labels: dict[str, str] | None = None,
    benchmarks: Mapping[str, ImageFolder] | None = None,
    indexes: RowIndexes | None = None,
) -> Manifest:
    """Prepare the missing blocks with Ray Data, then publish the corpus.

    `tokenizer` is the tokenizer's fingerprint for the manifest; `node_labels` select the nodes to use; `benchmarks` has
    the images of those that operators name; `indexes` are those of the annotation files, built here without it. Raises
    UserError for sources that cannot be read and when more rows are quarantined than `quarantine_limit` allows,
    RunError when a worker fails.
    """
    output = storage_path(spec.output)
    rows_in, shards = stage_rows(spec, output, indexes)
    map_on_cluster = _map_on_cluster(spec, node_labels or {})
    complete = existing_shards(output, "record", "json", shards)
    reset_attempts(output, _missing(shards, complete))
    prepare_operators(spec, shards, benchmarks or {}, map_on_cluster)
    monitor = _QuarantineMonitor(spec, rows_in, output)
    for record in in_parallel(functools.partial(_read_record, output), complete):
        monitor.add(record)
    gauges = Gauges(output.name, "prepare")
    bar.update(monitor.rows, rows_in, quarantined=monitor.quarantined)
    for record in _make_blocks(spec, _missing(shards, complete), map_on_cluster):
        monitor.add(record)
        bar.update(monitor.rows, rows_in, quarantined=monitor.quarantined)
        gauges.set(rows=monitor.rows, quarantined_rows=monitor.quarantined)
    return publish_corpus(spec, output, shards, rows_in, tokenizer)


def _map_on_cluster(spec: PrepareSpec, node_labels: dict[str, str]) -> MapOnCluster:
    def map_on_cluster(function: Function, items: Sequence[int]) -> Iterator[dict[str, Any]]:
        set_up = functools.partial(load_once, spec)
        return map_with_ray_data(f"preparing corpora.{spec.name}", function, items, node_labels, set_up)

    return map_on_cluster


def prepare_operators(
    spec: PrepareSpec, shards: int, benchmarks: Mapping[str, ImageFolder], map_on_cluster: MapOnCluster
) -> None:
    """Compute what operators need of the whole corpus: hashes of benchmark images, and the duplicates, in order."""
    output = storage_path(spec.output)
    operators = list(enumerate(load_operators(spec.corpus.operators, f"corpora.{spec.name}.operators")))
    for position, operator in operators:
        if operator.name == DECONTAMINATE and not benchmark_hashes_file(output, position).exists():
            folders = [benchmarks[name] for name in operator.arguments["benchmarks"]]
            _hash_benchmark_images(spec, position, folders, map_on_cluster)
    for position, operator in operators:
        if operator.deduplicates:
            _find_duplicates(spec, position, operator.distance, shards, map_on_cluster)


def _hash_benchmark_images(
    spec: PrepareSpec, position: int, folders: Sequence[ImageFolder], map_on_cluster: MapOnCluster
) -> None:
    images = [(folder.root, name) for folder in folders for name in folder.names]
    chunks = [images[start : start + _IMAGES_PER_TASK] for start in range(0, len(images), _IMAGES_PER_TASK)]
    results = map_on_cluster(functools.partial(_image_hashes, chunks), range(len(chunks)))
    distinct = sorted({value for result in results for value in result["hashes"]})
    file = benchmark_hashes_file(storage_path(spec.output), position)
    file.write_bytes(np.array(distinct, dtype=np.uint64).tobytes())


def _image_hashes(chunks: Sequence[Sequence[tuple[str, str]]], chunk: int) -> dict[str, Any]:
    """Return the hashes of a chunk of (folder, name) images; an image that cannot be read has no hash."""
    hashes = []
    roots = {root: storage_path(root) for root, _ in chunks[chunk]}  # making one of a bucket takes a tenth of a second
    for root, name in chunks[chunk]:
        try:
            hashes.append(difference_hash((roots[root] / name).read_bytes()))
        except BadRow as bad:
            logger.warning("%s: not compared by %s: %s", name, DECONTAMINATE, bad)
    return {"hashes": np.array(hashes, dtype=np.uint64)}


def _find_duplicates(
    spec: PrepareSpec, position: int, distance: int, shards: int, map_on_cluster: MapOnCluster
) -> None:
    """Run the two passes of a de-duplication operator: the keys of all shards, then their duplicates by partition."""
    output = storage_path(spec.output)
    done = existing_shards(output, keys_kind(position), "arrow", shards)
    for _ in map_on_cluster(functools.partial(_shard_keys, spec, position), _missing(shards, done)):
        pass
    partitions = key_partitions(output)
    done = existing_shards(output, duplicates_kind(position), "npy", partitions)
    find = functools.partial(_partition_duplicates, output.uri, position, distance, shards, partitions)
    for _ in map_on_cluster(find, _missing(partitions, done)):
        pass


def _shard_keys(spec: PrepareSpec, position: int, shard: int) -> dict[str, Any]:
    return {"shard": shard, "keys": write_shard_keys(spec, position, shard)}


def _partition_duplicates(
    output: str, position: int, distance: int, shards: int, partitions: int, partition: int
) -> dict[str, Any]:
    duplicates = find_partition(storage_path(output), position, distance, shards, partition, partitions)
    return {"partition": partition, "duplicates": duplicates}


def _missing(count: int, done: Sequence[int]) -> list[int]:
    return sorted(set(range(count)) - set(done))


def _make_blocks(spec: PrepareSpec, shards: list[int], map_on_cluster: MapOnCluster) -> Iterator[BlockRecord]:
    """Run `make_block` for the shards on the cluster; yield the records in the order of completion."""
    for columns in map_on_cluster(functools.partial(_block_columns, spec), shards):
        yield BlockRecord(**columns)


def _block_columns(spec: PrepareSpec, shard: int) -> dict[str, Any]:
    return asdict(make_block(spec, shard))


def publish_corpus(spec: PrepareSpec, output: StoragePath, shards: int, rows_in: int, tokenizer: str) -> Manifest:
    """Merge the results of all shards into the files of a prepared corpus; the manifest is written last.

    Deletes the staged rows. Raises UserError when no row becomes a sample.
    """
    records = list(in_parallel(functools.partial(_read_record, output), range(shards)))
    lengths = concatenate_lengths(in_parallel(functools.partial(_read_lengths, output), range(shards)))
    if not len(lengths):
        raise UserError(
            f"corpora.{spec.name}: every row was quarantined or filtered out; see {output / SHARDS}/quarantine*.csv, "
            "then fix the corpus or its operators"
        )
    output.remove_partial_files()
    with tempfile.TemporaryDirectory() as folder:
        reasons = _merge_quarantine(output, shards, Path(folder) / QUARANTINE)
        load_tokenizer(spec.language).save_pretrained(Path(folder) / TOKENIZER)  # blocks can be decoded with it alone
        publish_folder(Path(folder), output)
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
        quarantined=sum(record.quarantined for record in records),
        filtered=sum(record.filtered for record in records),
        added=sum(record.added for record in records),
        quarantine=dict(reasons.most_common()),
    )
    assert manifest.rows + reasons.total() == rows_in + manifest.added, "a source row was lost"
    assert manifest.quarantined + manifest.filtered == reasons.total(), "records and quarantined rows differ"
    (output / LENGTHS).write_bytes(encode_lengths(lengths))
    (output / MANIFEST).write_bytes(manifest.to_json())
    (output / SHARDS).delete()
    return manifest


def _merge_quarantine(output: StoragePath, shards: int, file: Path) -> Counter[str]:
    """Write the rows of all shards that became no sample as one CSV file; count them by reason.

    Filters may take out most rows of a large corpus: only a few shards' rows are in memory.
    """
    reasons: Counter[str] = Counter()
    with file.open("wb") as merged:
        merged.write(encode_quarantine([]))
        header = merged.tell()
        for content in in_parallel(functools.partial(_read_quarantine, output), range(shards)):
            reasons.update(row.reason for row in decode_quarantine(content))
            merged.write(content[header:])
    return reasons


class _QuarantineMonitor:
    """Counts rows as blocks complete, and stops the run as soon as too many rows are quarantined."""

    def __init__(self, spec: PrepareSpec, rows_in: int, output: StoragePath) -> None:
        self._spec, self._rows_in, self._output = spec, rows_in, output
        self.rows = self.quarantined = 0

    def add(self, record: BlockRecord) -> None:
        """Add the rows of a completed block. Raises UserError (see `check_quarantine`)."""
        self.rows += record.rows + record.quarantined + record.filtered - record.added
        self.quarantined += record.quarantined
        counts = {"rows_in": self._rows_in, "quarantined": self.quarantined}
        check_quarantine(counts, self._spec.name, self._spec.corpus, self._output / SHARDS)


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


def _read_record(output: StoragePath, shard: int) -> BlockRecord:
    return BlockRecord(**json.loads(shard_file(output, "record", shard, "json").read_bytes()))


def _read_lengths(output: StoragePath, shard: int) -> Lengths:
    return decode_lengths(shard_file(output, "lengths", shard, "arrow").read_bytes())


def _read_quarantine(output: StoragePath, shard: int) -> bytes:
    return shard_file(output, "quarantine", shard, "csv").read_bytes()
