"""Makes the block of one shard: reads its rows, applies the corpus's operators, writes the samples.

The worker that handles a shard reads its rows and images, and writes its block to storage itself: no image passes
through the object store, and memory holds only the blocks in flight. A block is complete once its record, which is
written last, exists.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from raylava.config.recipe import OperatorConfig
from raylava.corpus.blocks import (
    BlockRecord,
    Sample,
    encode_block,
    encode_lengths,
    encode_quarantine,
    fetched_images_file,
    sample_lengths,
)
from raylava.corpus.conversation import ChatTokenizer
from raylava.corpus.crashes import READING, Announce, Crashes, announce_nothing, refuse_crashed, shard_attempt
from raylava.corpus.deduplication import KeyedRow, row_verdicts, write_keys
from raylava.corpus.fetch import UrlFetcher, is_url
from raylava.corpus.operator_library import DECONTAMINATE, load_operators
from raylava.corpus.operators import FilteredRow, Operator, OperatorChain
from raylava.corpus.quarantine import BadRow, QuarantinedRow, Reason, describe_error
from raylava.corpus.row_images import ImageReader, RowImages
from raylava.corpus.rows import SourceRow, image_names, parse_row, sample_id
from raylava.corpus.samples import make_sample
from raylava.corpus.shards import PrepareSpec, RawRow, key_partitions, read_shard, shard_file
from raylava.models.registry import LanguageSpec, load_tokenizer
from raylava.storage import StoragePath, storage_path

_FETCHED_TOGETHER = 256  # rows whose images are fetched at the same time, and held in memory


def make_block(spec: PrepareSpec, shard: int) -> BlockRecord:
    """Read the rows of one shard and write its block, lengths, quarantined rows and, last, its record.

    Raises RunError when the shard keeps killing its process, see crashes.py.
    """
    output = storage_path(spec.output)
    process_rows = functools.partial(_block_content, spec, shard)
    with shard_attempt(output, shard, "block", process_rows) as crashes:
        return _write_block(output, shard, process_rows(crashes))


def _block_content(
    spec: PrepareSpec, shard: int, crashes: Crashes, announce: Announce = announce_nothing
) -> "_BlockContent":
    content = _BlockContent()
    chat_tokenizer = _chat_tokenizer(spec.language)
    chain = _operator_chain(spec, shard, len(spec.corpus.operators))
    for outcome in _row_outcomes(spec, shard, chain, content.fetched, crashes, announce):
        row, problem = outcome.row, outcome.problem
        content.added += outcome.is_additional
        try:
            if problem is not None:
                raise problem
            assert row is not None
            sample, truncated = make_sample(row, outcome.read_image, chat_tokenizer, spec.corpus, spec.vision)
            content.samples.append(sample)
            content.truncated += truncated
        except (BadRow, FilteredRow) as bad:
            content.take_out(outcome, str(bad.reason), bad.detail, getattr(bad, "image", ""))
            content.filtered += isinstance(bad, FilteredRow)
        except (OSError, MemoryError):  # storage and memory concern more than this row
            raise
        except Exception as error:
            content.take_out(outcome, Reason.FAILED, describe_error(error))
    return content


def write_shard_keys(spec: PrepareSpec, operator: int, shard: int) -> int:
    """Write the keys of the rows of a shard that reach a de-duplication operator, given by its position.

    Returns the number of rows. Raises RunError like `make_block`.
    """
    output = storage_path(spec.output)
    process_rows = functools.partial(_keyed_rows, spec, operator, shard)
    with shard_attempt(output, shard, f"keys {operator}", process_rows) as crashes:
        rows = process_rows(crashes)
        write_keys(output, operator, shard, rows)
        return len(rows)


def _keyed_rows(
    spec: PrepareSpec, operator: int, shard: int, crashes: Crashes, announce: Announce = announce_nothing
) -> list[KeyedRow]:
    chain = _operator_chain(spec, shard, operator)
    return [
        _keyed_row(chain.operators[operator], outcome)
        for outcome in _row_outcomes(spec, shard, chain, [], crashes, announce, stop=operator)
        if outcome.row is not None and outcome.problem is None
    ]


def _keyed_row(operator: Operator, outcome: "_RowOutcome") -> KeyedRow:
    row, selected = outcome.row, outcome.raw.selected
    assert row is not None
    origin = row.sample_id.replace(selected.id_suffix, replace(selected, copy=0).id_suffix)
    try:
        key = operator.key(row, RowImages(row.images, outcome.read_image))
    except BadRow as bad:
        return KeyedRow(row.sample_id, origin, None, bad)
    return KeyedRow(row.sample_id, origin, key)


@dataclass(frozen=True)
class _RowOutcome:
    """A row that the operators made of a raw row, or the problem of either.

    `row` is None if the raw row could not be parsed. `is_additional` tells that it is not the first row made of it.
    """

    raw: RawRow
    row: SourceRow | None
    problem: BadRow | FilteredRow | None
    read_image: ImageReader
    is_additional: bool = False


def _row_outcomes(
    spec: PrepareSpec,
    shard: int,
    chain: OperatorChain,
    fetched_records: list[bytes],
    crashes: Crashes,
    announce: Announce,
    stop: int | None = None,
) -> Iterator[_RowOutcome]:
    """Yield the outcomes of the rows of a shard after the first `stop` operators (all, without it).

    Appends a record of each image that was fetched to `fetched_records`. Images are fetched only if they are needed.
    Rows among `crashes` are not processed.
    """
    fetcher = UrlFetcher(spec.corpus.fetch)
    fetches = stop is None or any(operator.uses_images for operator in chain.operators[: stop + 1])
    rows = read_shard(spec, shard)
    announce(READING)
    while batch := list(itertools.islice(rows, _FETCHED_TOGETHER)):
        names = (name for raw in batch for name in image_names(raw.content) if is_url(name))
        fetched = fetcher.fetch_all(names if fetches else ())
        fetched_records += [image.record() for image in fetched.values()]
        for raw in batch:
            reader = ImageReader(raw.image_root, spec.corpus.max_image_bytes, fetched)
            announce(raw.position)
            try:
                refuse_crashed(raw.position, crashes)
                parsed = parse_row(raw.content, raw.selected.id_suffix)
            except BadRow as bad:
                yield _RowOutcome(raw, None, bad, reader)
                continue
            for number, (row, problem) in enumerate(chain.apply(parsed, reader, stop)):
                yield _RowOutcome(raw, row, problem, reader, is_additional=number > 0)
        announce(READING)


def _operator_chain(spec: PrepareSpec, shard: int, known: int) -> OperatorChain:
    """Return the corpus's operators for a shard; the duplicates of the first `known` operators have been found."""
    settings = tuple(operator.model_dump_json() for operator in spec.corpus.operators)
    operators, output = _operators(spec.name, spec.output, settings), storage_path(spec.output)
    verdicts = {
        position: row_verdicts(output, position, operator.name, shard, key_partitions(output))
        for position, operator in enumerate(operators[:known])
        if operator.deduplicates
    }
    return OperatorChain(operators, verdicts)


@functools.lru_cache(maxsize=4)
def _operators(name: str, output: str, settings: tuple[str, ...]) -> tuple[Operator, ...]:
    """Return the operators of a corpus, with the hashes of benchmark images in place of the benchmarks' names."""
    configs = [OperatorConfig.model_validate_json(setting) for setting in settings]
    operators = load_operators(configs, f"corpora.{name}.operators")
    for position, operator in enumerate(operators):
        if operator.name == DECONTAMINATE:
            hashes = np.frombuffer(benchmark_hashes_file(storage_path(output), position).read_bytes(), dtype=np.uint64)
            operators[position] = operator.bind(benchmarks=hashes)
    return tuple(operators)


@functools.cache
def _chat_tokenizer(language: LanguageSpec) -> ChatTokenizer:
    """Return a tokenizer that is loaded once per process: loading Gemma's takes longer than tokenizing many rows."""
    return ChatTokenizer(load_tokenizer(language), language.template)


def load_once(spec: PrepareSpec) -> None:
    """Load in this process what every block needs."""
    _chat_tokenizer(spec.language)


@dataclass
class _BlockContent:
    """The samples of one shard, and the rows that became none.

    `truncated` counts truncated samples, `filtered` the rows that operators took out, `added` the rows that they made
    beyond one of each. `fetched` are JSON lines about the images that were fetched, see FetchedImage.record.
    """

    samples: list[Sample] = field(default_factory=list)
    taken_out: list[QuarantinedRow] = field(default_factory=list)
    truncated: int = 0
    filtered: int = 0
    added: int = 0
    fetched: list[bytes] = field(default_factory=list)

    def take_out(self, outcome: _RowOutcome, reason: str, detail: str, image: str = "") -> None:
        """List a row that becomes no sample; `image` is the one to blame, if one is."""
        raw = outcome.raw
        image = image or " ".join(image_names(raw.content))
        name = sample_id(raw.content, raw.selected.id_suffix) if outcome.row is None else outcome.row.sample_id
        self.taken_out.append(QuarantinedRow(raw.selected.row, name, raw.file.name, reason, detail, image))


def _write_block(output: StoragePath, shard: int, content: _BlockContent) -> BlockRecord:
    path = f"blocks/block-{shard:05d}.arrow"
    block = encode_block(content.samples)
    (output / path).write_bytes(block)
    shard_file(output, "lengths", shard, "arrow").write_bytes(encode_lengths(sample_lengths(content.samples)))
    shard_file(output, "quarantine", shard, "csv").write_bytes(encode_quarantine(content.taken_out))
    fetched = b"".join(content.fetched)
    if fetched:
        (output / fetched_images_file(shard)).write_bytes(fetched)
    record = BlockRecord(
        path=path,
        rows=len(content.samples),
        quarantined=len(content.taken_out) - content.filtered,
        filtered=content.filtered,
        added=content.added,
        truncated=content.truncated,
        bytes=len(block),
        sha256=hashlib.sha256(block).hexdigest(),
        fetched=len(content.fetched),
        fetched_sha256=hashlib.sha256(fetched).hexdigest() if fetched else "",
    )
    shard_file(output, "record", shard, "json").write_bytes(json.dumps(asdict(record)).encode())
    return record


def benchmark_hashes_file(output: StoragePath, operator: int) -> StoragePath:
    """Return the file with the hashes (uint64) of the benchmark images that the operator at a position compares."""
    return shard_file(output, "benchmark-hashes", operator, "bin")
