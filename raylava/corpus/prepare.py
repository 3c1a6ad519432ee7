"""Source rows → Arrow blocks, by Ray Data.

    annotations ──shards of rows (text only)──▶ Ray Data: one task a shard ──▶ block, quarantine part, record

A shard's task reads its rows and their images, encodes both, and publishes its block itself, so no pixel crosses the
object store and memory holds only the blocks in flight. Shards are cut by row count alone: the same corpus gives the
same bytes whatever the parallelism. A block is done when its record, written last, is there; a second run makes only
the rest.
"""

import functools
import gc
import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from raylava.cluster.gauges import Gauges
from raylava.cluster.nodes import eventual_resources, matching_resources, startable_node_types
from raylava.cluster.session import told
from raylava.config.recipe import Corpus, Language
from raylava.console import ProgressBar
from raylava.corpus.blocks import (
    LENGTHS,
    MANIFEST,
    QUARANTINE,
    SCHEMA_VERSION,
    TOKENIZER,
    BlockRecord,
    Manifest,
    Sample,
    block_bytes,
    concatenated,
    count_reasons,
    lengths_bytes,
    lengths_of,
    quarantine_bytes,
    read_lengths,
    read_quarantine,
)
from raylava.corpus.conversation import ChatTokenizer, TokenizedChat, check_turns
from raylava.corpus.images import prepare_image
from raylava.corpus.quarantine import BadRow, Quarantined, Reason
from raylava.corpus.sources import Row, SelectedRow, SourceFiles, image_place, parse_row, sample_id
from raylava.errors import RunError, UserError
from raylava.models.registry import VisionSpec, load_tokenizer
from raylava.models.templates import IMAGE_TOKEN, Template
from raylava.storage import StoragePath, storage_path

logger = logging.getLogger(__name__)

_SHARDS = "rows"  # the staged rows; removed once the manifest stands
_INDEX = "index.json"


@dataclass(frozen=True)
class PrepareSpec:
    """All that a task needs to turn a shard into a block; small, and the same on every node."""

    name: str
    corpus: Corpus
    places: tuple[tuple[str, str], ...]  # each source's annotations and images, absolute
    language: Language
    template: Template
    vision: VisionSpec
    output: str

    @property
    def sources(self) -> list[SourceFiles]:
        """The corpus's sources with their files."""
        return [SourceFiles(source, *places) for source, places in zip(self.corpus.sources, self.places, strict=True)]


def prepare(spec: PrepareSpec, tokenizer: str, bar: ProgressBar, labels: dict[str, str] | None = None) -> Manifest:
    """Make the blocks that are missing, then the manifest. `tokenizer` is its identity, for the manifest; `labels`
    select the nodes to work on.

    Raises UserError when the source isn't LLaVA JSON, or when more rows are set aside than `quarantine_limit` allows.
    """
    output = storage_path(spec.output)
    rows_in, shards = _stage_rows(spec, output)
    done = [shard for shard in range(shards) if _record_place(output, shard).exists()]
    pending = [shard for shard in range(shards) if shard not in set(done)]
    tally = _Tally(spec, rows_in, output)
    for shard in done:
        tally.add(_read_record(output, shard))
    gauges = Gauges(output.name, "prepare")
    bar.update(tally.rows, rows_in, quarantined=tally.quarantined)
    for record in _run(spec, pending, labels or {}):
        tally.add(record)
        bar.update(tally.rows, rows_in, quarantined=tally.quarantined)
        gauges.set(rows=tally.rows, quarantined_rows=tally.quarantined)
    return _publish(spec, output, shards, rows_in, tokenizer)


def _stage_rows(spec: PrepareSpec, output: StoragePath) -> tuple[int, int]:
    """Cut the chosen rows into shards of `samples_per_block`; returns (rows, shards). Does nothing the second time.

    A shard says where its rows lie and holds none of them, so this reads annotations once and copies nothing.
    """
    index = output / _SHARDS / _INDEX
    if index.exists():
        about = json.loads(index.read_bytes())
        return about["rows"], about["shards"]
    rows = shards = 0
    for shard, lines in enumerate(_shards(spec)):
        _shard_place(output, shard).write_bytes(b"\n".join(lines))
        rows += len(lines)
        shards += 1
    if not rows:
        raise UserError(f"corpora.{spec.name}: no row is chosen by include, exclude and limit; widen them")
    index.write_bytes(json.dumps({"rows": rows, "shards": shards}).encode())
    return rows, shards


def _shards(spec: PrepareSpec) -> Iterator[list[bytes]]:
    lines: list[bytes] = []
    for number, source in enumerate(spec.sources):
        for pick in source.picks(number):
            lines.append(json.dumps(astuple(pick)).encode())
            if len(lines) == spec.corpus.samples_per_block:
                yield lines
                lines = []
    if lines:
        yield lines


def _run(spec: PrepareSpec, pending: list[int], labels: dict[str, str]) -> Iterator[BlockRecord]:
    """The records of the pending shards, as Ray Data finishes them."""
    if not pending:
        return
    import ray.data

    shards: ray.data.Dataset = ray.data.from_items(
        [{"shard": shard} for shard in pending], override_num_blocks=len(pending)
    )
    # Actors and not tasks: a second shard waits in each, so that none idles while Ray Data looks round (0.2 s a shard).
    workers = max(1, min(len(pending), int(matching_resources(labels).get("CPU", 0))))
    most = None if startable_node_types() is None else max(workers, int(eventual_resources(labels).get("CPU", 0)))
    pool = ray.data.ActorPoolStrategy(  # without `most`, Ray Data asks the autoscaler for nodes of any kind
        min_size=1, initial_size=workers, max_size=most, max_tasks_in_flight_per_actor=2
    )
    made = shards.map(_MakeBlock, fn_constructor_args=(spec,), compute=pool, label_selector=labels or None)
    for row in made.iter_rows():
        if row["problem"]:
            raise RunError(f"preparing corpora.{spec.name} failed: {row['problem']}")
        yield BlockRecord(**json.loads(row["record"]))


class _MakeBlock:
    """The Ray Data function: a shard's number in, its block's record out."""

    def __init__(self, spec: PrepareSpec) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker has one CPU
        self._spec = spec
        _encoder(spec.language, spec.template)
        gc.freeze()  # what torch and transformers brought stays: no use in looking through it again and again

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        try:
            return {"record": json.dumps(asdict(make_block(self._spec, int(row["shard"])))), "problem": ""}
        except Exception as error:
            return {"record": "", "problem": told(error)}


def make_block(spec: PrepareSpec, shard: int) -> BlockRecord:
    """Read one shard's rows, and publish its block, its lengths, its quarantine part and, last, its record."""
    output = storage_path(spec.output)
    made = _Made([], [], 0)
    encoder = _encoder(spec.language, spec.template)
    for pick, file, images, raw in _raw_rows(spec, output, shard):
        try:
            sample, trimmed = make_sample(parse_row(raw, pick.suffix), encoder, images, spec)
            made.samples.append(sample)
            made.trimmed += trimmed
        except BadRow as bad:
            made.quarantined.append(
                Quarantined(pick.row, sample_id(raw, pick.suffix), file.name, bad.reason, bad.detail)
            )
    return _write(output, shard, made)


@dataclass
class _Made:
    """What became of a shard's rows."""

    samples: list[Sample]
    quarantined: list[Quarantined]
    trimmed: int


def _raw_rows(
    spec: PrepareSpec, output: StoragePath, shard: int
) -> Iterator[tuple[SelectedRow, StoragePath, StoragePath, Any]]:
    """(pick, its file, its image root, raw row) of a shard's rows, neighbours in a file read together."""
    picks = [SelectedRow(*json.loads(line)) for line in _shard_place(output, shard).read_bytes().splitlines()]
    sources = spec.sources
    for (number, file_number), run in itertools.groupby(picks, key=lambda pick: (pick.source, pick.file)):
        source, chosen = sources[number], list(run)
        file, images = source.files[file_number], storage_path(source.images)
        raws = source.format(file).read(file, [pick.where for pick in chosen])
        for pick, raw in zip(chosen, raws, strict=True):
            yield pick, file, images, raw


def make_sample(row: Row, encoder: ChatTokenizer, image_root: StoragePath, spec: PrepareSpec) -> tuple[Sample, bool]:
    """One row as a sample, and whether it was trimmed. Cheap checks come before images are read. Raises BadRow."""
    check_turns(row.turns, len(row.images))
    encoded = _encode_within(row, encoder, spec)
    length = encoded.length(spec.vision.image_tokens)
    images = [
        prepare_image(
            image if isinstance(image, bytes) else _read_image(image_root, image),
            spec.vision.pixels,
            spec.corpus.image_aspect,
            spec.corpus.image_encoding,
            spec.corpus.max_pixels,
        )
        for image in row.images[: encoded.images]
    ]
    trimmed = 2 * len(encoded.loss_spans) < len(row.turns)
    return Sample(row.sample_id, encoded.input_ids, encoded.loss_spans, images, length), trimmed


def _encode_within(row: Row, encoder: ChatTokenizer, spec: PrepareSpec) -> TokenizedChat:
    """The row's ids within `max_length`; with `on_overlong: trim`, whole exchanges are left off its end until it fits.

    A image goes with the turn that shows it. Raises BadRow when even the first exchange is too long.
    """
    first = len(row.turns) if spec.corpus.on_overlong == "quarantine" else 2
    for turns in range(len(row.turns), first - 1, -2):
        kept = row.turns[:turns]
        encoded = encoder.encode(kept, sum(turn.text.count(IMAGE_TOKEN) for turn in kept))
        length = encoded.length(spec.vision.image_tokens)
        if length <= spec.corpus.max_length:
            return encoded
    raise BadRow(Reason.TOO_LONG, f"{length} tokens, more than max_length={spec.corpus.max_length}")


def _read_image(root: StoragePath, name: str) -> bytes:
    file = image_place(root, name)
    if root.is_local:
        _refuse_link_out(root, file, name)
    try:
        return file.read_bytes()
    except OSError as error:
        if not root.exists():  # the folder itself is gone: that is no fault of this row
            raise
        if isinstance(error, FileNotFoundError):
            raise BadRow(Reason.IMAGE_MISSING, name) from error
        if file.is_folder():
            raise BadRow(Reason.IMAGE_MISSING, f"{name} is a folder") from error
        raise BadRow(Reason.IMAGE_UNREADABLE, f"{name}: {error}"[:200]) from error


def _refuse_link_out(root: StoragePath, file: StoragePath, name: str) -> None:
    folder, _, last = file.path.rpartition("/")
    real = Path(file.path).resolve() if os.path.islink(file.path) else _real_folder(folder) / last
    if not real.is_relative_to(_real_folder(root.path)):
        raise BadRow(Reason.PATH_ESCAPES, f"{name} is a link out of the image folder")


@functools.lru_cache(maxsize=4096)
def _real_folder(path: str) -> Path:
    """Links followed. Remembered: to ask the disk again for every image takes longer than to read it."""
    return Path(path).resolve()


@functools.cache
def _encoder(language: Language, template: Template) -> ChatTokenizer:
    """Once a worker process: loading Gemma's tokenizer takes longer than encoding many rows."""
    return ChatTokenizer(load_tokenizer(language), template)


def _write(output: StoragePath, shard: int, made: _Made) -> BlockRecord:
    path = f"blocks/block-{shard:05d}.arrow"
    content = block_bytes(made.samples)
    (output / path).write_bytes(content)
    _lengths_place(output, shard).write_bytes(lengths_bytes(lengths_of(made.samples)))
    _quarantine_place(output, shard).write_bytes(quarantine_bytes(made.quarantined))
    sha256 = hashlib.sha256(content).hexdigest()
    record = BlockRecord(path, len(made.samples), len(made.quarantined), made.trimmed, len(content), sha256)
    _record_place(output, shard).write_bytes(json.dumps(asdict(record)).encode())
    return record


def _publish(spec: PrepareSpec, output: StoragePath, shards: int, rows_in: int, tokenizer: str) -> Manifest:
    records = [_read_record(output, shard) for shard in range(shards)]
    lengths = concatenated(read_lengths(_lengths_place(output, shard).read_bytes()) for shard in range(shards))
    quarantine = [
        row for shard in range(shards) for row in read_quarantine(_quarantine_place(output, shard).read_bytes())
    ]
    if not len(lengths):
        raise UserError(f"corpora.{spec.name}: every row was set aside; see {output / _SHARDS}/quarantine*.csv")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        tokenizer=tokenizer,
        pixels=spec.vision.identity(),
        blocks=tuple(records),
        rows_in=rows_in,
        rows=len(lengths),
        tokens=int(lengths.length.sum()),
        loss_tokens=int(lengths.loss_tokens.sum()),
        images=int(lengths.images.sum()),
        trimmed=sum(record.trimmed for record in records),
        quarantined=len(quarantine),
        quarantine=count_reasons(quarantine),
    )
    assert manifest.rows + manifest.quarantined == rows_in, "a source row was lost"
    output.remove_partial_files()
    _keep_tokenizer(spec, output)
    (output / LENGTHS).write_bytes(lengths_bytes(lengths))
    (output / QUARANTINE).write_bytes(quarantine_bytes(quarantine))
    (output / MANIFEST).write_bytes(manifest.to_json())
    (output / _SHARDS).delete()
    return manifest


def _keep_tokenizer(spec: PrepareSpec, output: StoragePath) -> None:
    """The tokenizer goes with the blocks, so that they can be read back as text wherever they are."""
    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer(spec.language).save_pretrained(folder)
        (output / TOKENIZER).upload_folder(Path(folder))


class _Tally:
    """Counts rows as blocks finish, and stops the run as soon as too many were set aside."""

    def __init__(self, spec: PrepareSpec, rows_in: int, output: StoragePath) -> None:
        self._spec, self._rows_in, self._output = spec, rows_in, output
        self.rows = self.quarantined = 0

    def add(self, record: BlockRecord) -> None:
        self.rows += record.rows + record.quarantined
        self.quarantined += record.quarantined
        counts = {"rows_in": self._rows_in, "quarantined": self.quarantined}
        check_quarantine(counts, self._spec.name, self._spec.corpus, self._output / _SHARDS)


def check_quarantine(metrics: dict[str, Any], name: str, corpus: Corpus, where: StoragePath) -> None:
    """Raise UserError when more rows were set aside than the recipe allows."""
    quarantined, rows_in = metrics["quarantined"], metrics["rows_in"]
    if quarantined > corpus.quarantine_limit * rows_in:
        raise UserError(
            f"corpora.{name}: {quarantined} of {rows_in} rows had to be set aside, more than quarantine_limit="
            f"{corpus.quarantine_limit:g} allows; see {where}/quarantine*.csv, then mend the corpus or raise the limit"
        )


def _shard_place(output: StoragePath, shard: int) -> StoragePath:
    return output / _SHARDS / f"shard-{shard:05d}.jsonl"


def _lengths_place(output: StoragePath, shard: int) -> StoragePath:
    return output / _SHARDS / f"lengths-{shard:05d}.arrow"


def _quarantine_place(output: StoragePath, shard: int) -> StoragePath:
    return output / _SHARDS / f"quarantine-{shard:05d}.csv"


def _record_place(output: StoragePath, shard: int) -> StoragePath:
    return output / _SHARDS / f"record-{shard:05d}.json"


def _read_record(output: StoragePath, shard: int) -> BlockRecord:
    return BlockRecord(**json.loads(_record_place(output, shard).read_bytes()))
