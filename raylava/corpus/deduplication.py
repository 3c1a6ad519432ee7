"""Finds duplicate rows from their keys, in partitions that Ray Data tasks work on independently.

    keys-K-SHARD.arrow      the sample id of each row that reaches operator K, its DuplicateKey, or why it has none
    duplicates-K-PART.npy   rows of all shards that a partition found to be duplicates of an earlier row

A row is a duplicate if its group equals that of an earlier row and their image hashes differ in at most `distance`
bits, whether or not that earlier row is a duplicate itself. The copies that `sampling_weight` makes of a row share its
fate: they are no duplicates of each other. Every such pair of hashes has at least one of
`distance` + 1 bands of bits in common, so that only rows that share a band are compared.
"""

import functools
import hashlib
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raylava.corpus.image_hash import differing_bits
from raylava.corpus.operators import DuplicateKey, FilteredRow
from raylava.corpus.quarantine import BadRow, Reason
from raylava.corpus.shards import in_parallel, shard_file
from raylava.storage import StoragePath, storage_path

_HASH_BITS = 64
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("origin", pa.uint64()),
        ("group", pa.binary(16)),
        ("image_hash", pa.uint64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)

Words = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class KeyedRow:
    """A row that reaches a de-duplication operator.

    `origin` is the row's id without the number of its copy. `key` is None for a row that has no duplicates, and for one
    that could not be compared, which has a `problem`.
    """

    sample_id: str
    origin: str
    key: DuplicateKey | None
    problem: BadRow | None = None


@dataclass(frozen=True)
class Keys:
    """Keys of n rows in source order, as uint64: origins (n,), groups (n, 2), image hashes (n,)."""

    origins: Words
    groups: Words
    hashes: Words

    def __len__(self) -> int:
        return len(self.hashes)

    def take(self, rows: Any) -> "Keys":
        """Return the keys of some rows, given by indices or a mask."""
        return Keys(self.origins[rows], self.groups[rows], self.hashes[rows])


def write_keys(output: StoragePath, operator: int, shard: int, rows: Sequence[KeyedRow]) -> None:
    """Write the keys of a shard, in the order of its rows."""
    columns = {
        "sample_id": [row.sample_id for row in rows],
        "origin": [int.from_bytes(_digest(row.origin.encode(), 8), "big") for row in rows],
        "group": [row.key and _digest(row.key.group, 16) for row in rows],
        "image_hash": [row.key.image_hash if row.key else 0 for row in rows],
        "reason": [row.problem and str(row.problem.reason) for row in rows],
        "detail": [row.problem and row.problem.detail for row in rows],
    }
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _SCHEMA) as writer:
        writer.write_table(pa.table(columns, schema=_SCHEMA))
    _keys_file(output, operator, shard).write_bytes(sink.getvalue().to_pybytes())


def _digest(content: bytes, size: int) -> bytes:
    return hashlib.blake2b(content, digest_size=size).digest()


def find_partition(
    output: StoragePath, operator: int, distance: int, shards: int, partition: int, partitions: int
) -> int:
    """Write the duplicates that one partition of all keys contains; return their number."""
    reads = in_parallel(functools.partial(_read_keys, output, operator), range(shards))
    selected = [_select(*keys, distance, partition, partitions) for keys in reads]
    keys = Keys(*(np.concatenate([getattr(part, field.name) for part, _ in selected]) for field in fields(Keys)))
    duplicates = np.concatenate([positions for _, positions in selected])[find_duplicates(keys, distance)]
    content = io.BytesIO()
    np.save(content, duplicates, allow_pickle=False)
    _duplicates_file(output, operator, partition).write_bytes(content.getvalue())
    return len(duplicates)


def row_verdicts(
    output: StoragePath, operator: int, name: str, shard: int, partitions: int
) -> dict[str, BadRow | FilteredRow]:
    """Return the rows of a shard that are taken out, by sample id: duplicates, and those that could not be compared.

    `name` is that of the operator, for the reason.
    """
    duplicates: set[int] = set()
    for partition in range(partitions):
        positions = _read_duplicates(_duplicates_file(output, operator, partition).uri)
        first, last = np.searchsorted(positions, [shard << 32, (shard + 1) << 32])
        duplicates.update((positions[first:last] & 0xFFFFFFFF).tolist())
    table = _read_table(output, operator, shard)
    names, reasons, details = (table[column].to_pylist() for column in ("sample_id", "reason", "detail"))
    verdicts: dict[str, BadRow | FilteredRow] = {names[row]: FilteredRow(name) for row in duplicates}
    failed = (row for row, reason in enumerate(reasons) if reason is not None)
    return verdicts | {names[row]: BadRow(Reason(reasons[row]), details[row]) for row in failed}


def find_duplicates(keys: Keys, distance: int) -> Positions:
    """Return the sorted indices of rows that duplicate an earlier one."""
    identical = _repeated(keys)
    if not distance or not len(keys):
        return identical
    distinct = np.setdiff1d(np.arange(len(keys)), identical, assume_unique=True)
    duplicates = [identical]
    for band in _bands(keys.hashes[distinct], distance):
        for bucket in _buckets(keys.groups[distinct, 0], keys.groups[distinct, 1], band):
            duplicates.append(_near_earlier(distinct[bucket], keys, distance))
    return np.unique(np.concatenate(duplicates))


def _repeated(keys: Keys) -> Positions:
    """Return the indices of rows with the group and hash of an earlier row of another origin."""
    columns = (keys.groups[:, 0], keys.groups[:, 1], keys.hashes)
    order = np.lexsort(columns)  # stable: equal rows stay in their order
    starts = np.zeros(len(order), dtype=bool)
    starts[:1] = True
    for column in columns:
        starts[1:] |= column[order[1:]] != column[order[:-1]]
    first = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]  # of the rows equal to each
    return np.sort(order[keys.origins[order] != keys.origins[first]])


def _buckets(*columns: Words) -> Iterator[Positions]:
    """Yield the indices, ascending, of each set of at least two rows whose values are equal."""
    order = np.lexsort(columns)
    if not len(order):
        return
    changes = np.zeros(len(order) - 1, dtype=bool)
    for column in columns:
        changes |= column[order[1:]] != column[order[:-1]]
    for bucket in np.split(order, np.flatnonzero(changes) + 1):
        if len(bucket) > 1:
            yield bucket


def _near_earlier(rows: Positions, keys: Keys, distance: int) -> Positions:
    """Return those of the rows whose hash is within `distance` bits of an earlier one's of another origin."""
    hashes, origins = keys.hashes[rows], keys.origins[rows]
    near = [
        ((differing_bits(hashes[:row], hashes[row]) <= distance) & (origins[:row] != origins[row])).any()
        for row in range(1, len(rows))
    ]
    return rows[1:][np.array(near, dtype=bool)]


def _bands(hashes: Words, distance: int) -> Iterator[Words]:
    """Yield the bits of each of `distance` + 1 bands of the hashes, as equal as possible in width."""
    edges = np.linspace(0, _HASH_BITS, distance + 2).astype(int)
    for start, stop in itertools.pairwise(edges):
        mask = np.uint64((1 << int(stop - start)) - 1)
        yield (hashes >> np.uint64(start)) & mask


def _select(keys: Keys, positions: Positions, distance: int, partition: int, partitions: int) -> tuple[Keys, Positions]:
    """Return the rows of a shard that belong to a partition: those of which a band falls into it."""
    if partitions == 1:
        return keys, positions
    selected = np.zeros(len(keys), dtype=bool)
    for number, band in enumerate(_bands(keys.hashes, distance)):
        mixed = (keys.groups[:, 0] ^ (band * _MULTIPLIER) ^ np.uint64(number)) * _MULTIPLIER
        selected |= (mixed >> np.uint64(32)) % np.uint64(partitions) == np.uint64(partition)
    return keys.take(selected), positions[selected]


def _read_keys(output: StoragePath, operator: int, shard: int) -> tuple[Keys, Positions]:
    """Return the keys of a shard's rows that have one, and the rows' positions in the corpus."""
    table = _read_table(output, operator, shard)
    present = table["group"].is_valid().to_numpy()
    groups = b"".join(table["group"].drop_null().to_pylist())
    keys = Keys(
        table["origin"].to_numpy()[present],
        np.frombuffer(groups, dtype=np.uint64).reshape(-1, 2),
        table["image_hash"].to_numpy()[present],
    )
    return keys, np.flatnonzero(present).astype(np.int64) | (shard << 32)


def _read_table(output: StoragePath, operator: int, shard: int) -> pa.Table:
    return pa.ipc.open_stream(_keys_file(output, operator, shard).read_bytes()).read_all()


@functools.lru_cache(maxsize=64)
def _read_duplicates(uri: str) -> Positions:
    """Return a partition's duplicates; cached, because every shard needs a part of each."""
    positions: Positions = np.load(io.BytesIO(storage_path(uri).read_bytes()), allow_pickle=False)
    return positions


def _keys_file(output: StoragePath, operator: int, shard: int) -> StoragePath:
    return shard_file(output, keys_kind(operator), shard, "arrow")


def _duplicates_file(output: StoragePath, operator: int, partition: int) -> StoragePath:
    return shard_file(output, duplicates_kind(operator), partition, "npy")


def keys_kind(operator: int) -> str:
    """Return the kind of shard file that holds the keys of an operator."""
    return f"keys-{operator}"


def duplicates_kind(operator: int) -> str:
    """Return the kind of file that holds the duplicates of a partition."""
    return f"duplicates-{operator}"
