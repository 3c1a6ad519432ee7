"""Finds duplicate rows from their keys: in partitions that Ray Data tasks work on independently, at any corpus size.

    keys-K-SHARD.arrow      the sample id and the DuplicateKey of each row that reaches operator K
    duplicates-K-PART.npy   rows of all shards that a partition found to be duplicates of an earlier row

A row is a duplicate if its group equals that of an earlier row and their image hashes differ in at most `distance`
bits, whether or not that earlier row is a duplicate itself. Every such pair of hashes has at least one of
`distance` + 1 bands of bits in common, so that only rows that share a band are compared.
"""

import functools
import hashlib
import io
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raylava.corpus.image_hash import differing_bits
from raylava.corpus.operators import DuplicateKey
from raylava.corpus.shards import in_parallel, shard_file
from raylava.storage import StoragePath, storage_path

_HASH_BITS = 64
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SCHEMA = pa.schema([("sample_id", pa.string()), ("group", pa.binary(16)), ("image_hash", pa.uint64())])

Words = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]


def write_keys(output: StoragePath, operator: int, shard: int, keys: Sequence[tuple[str, DuplicateKey | None]]) -> None:
    """Write the (sample id, key) pairs of a shard, in the order of its rows; a row without a key has no duplicates."""
    groups = [None if key is None else hashlib.blake2b(key.group, digest_size=16).digest() for _, key in keys]
    columns = {
        "sample_id": [name for name, _ in keys],
        "group": groups,
        "image_hash": [0 if key is None else key.image_hash for _, key in keys],
    }
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _SCHEMA) as writer:
        writer.write_table(pa.table(columns, schema=_SCHEMA))
    _keys_file(output, operator, shard).write_bytes(sink.getvalue().to_pybytes())


def find_partition(
    output: StoragePath, operator: int, distance: int, shards: int, partition: int, partitions: int
) -> int:
    """Write the duplicates that one partition of all keys contains; return their number."""
    reads = in_parallel(functools.partial(_read_keys, output, operator), range(shards))
    selected = [_select(*keys, distance, partition, partitions) for keys in reads]
    groups, hashes, positions = (np.concatenate(parts) for parts in zip(*selected, strict=True))
    duplicates = positions[find_duplicates(groups, hashes, distance)]
    content = io.BytesIO()
    np.save(content, duplicates, allow_pickle=False)
    _duplicates_file(output, operator, partition).write_bytes(content.getvalue())
    return len(duplicates)


def duplicate_ids(output: StoragePath, operator: int, shard: int, partitions: int) -> frozenset[str]:
    """Return the sample ids of the duplicates in a shard."""
    rows: set[int] = set()
    for partition in range(partitions):
        positions = _read_duplicates(_duplicates_file(output, operator, partition).uri)
        first, last = np.searchsorted(positions, [shard << 32, (shard + 1) << 32])
        rows.update((positions[first:last] & 0xFFFFFFFF).tolist())
    if not rows:
        return frozenset()
    names = _read_table(output, operator, shard)["sample_id"]
    return frozenset(names[row].as_py() for row in rows)


def find_duplicates(groups: Words, hashes: Words, distance: int) -> Positions:
    """Return the sorted indices of rows that duplicate an earlier one; `groups` is (n, 2), `hashes` (n,)."""
    identical = _repeated(groups[:, 0], groups[:, 1], hashes)
    if not distance or not len(hashes):
        return identical
    distinct = np.setdiff1d(np.arange(len(hashes)), identical, assume_unique=True)
    found = [identical]
    for band in _bands(hashes[distinct], distance):
        for bucket in _buckets(groups[distinct, 0], groups[distinct, 1], band):
            found.append(_near_earlier(distinct[bucket], hashes, distance))
    return np.unique(np.concatenate(found))


def _repeated(*columns: Words) -> Positions:
    """Return the indices of rows whose values all equal those of an earlier row."""
    order = np.lexsort(columns)  # stable: equal rows stay in their order
    equal = np.ones(max(0, len(order) - 1), dtype=bool)
    for column in columns:
        equal &= column[order[1:]] == column[order[:-1]]
    return np.sort(order[1:][equal])


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


def _near_earlier(rows: Positions, hashes: Words, distance: int) -> Positions:
    """Return those of the rows whose hash is within `distance` bits of an earlier one's."""
    values = hashes[rows]
    near = [(differing_bits(values[:number], values[number]) <= distance).any() for number in range(1, len(rows))]
    return rows[1:][np.array(near, dtype=bool)]


def _bands(hashes: Words, distance: int) -> Iterator[Words]:
    """Yield the bits of each of `distance` + 1 bands of the hashes, as equal as possible in width."""
    edges = np.linspace(0, _HASH_BITS, distance + 2).astype(int)
    for start, stop in itertools.pairwise(edges):
        mask = np.uint64((1 << int(stop - start)) - 1)
        yield (hashes >> np.uint64(start)) & mask


def _select(
    groups: Words, hashes: Words, positions: Positions, distance: int, partition: int, partitions: int
) -> tuple[Words, Words, Positions]:
    """Return the rows of a shard that belong to a partition: those of which a band falls into it."""
    if partitions == 1:
        return groups, hashes, positions
    selected = np.zeros(len(hashes), dtype=bool)
    for number, band in enumerate(_bands(hashes, distance)):
        mixed = (groups[:, 0] ^ (band * _MULTIPLIER) ^ np.uint64(number)) * _MULTIPLIER
        selected |= (mixed >> np.uint64(32)) % np.uint64(partitions) == np.uint64(partition)
    return groups[selected], hashes[selected], positions[selected]


def _read_keys(output: StoragePath, operator: int, shard: int) -> tuple[Words, Words, Positions]:
    """Return the groups (n, 2), the hashes and the positions in the corpus of a shard's rows that have a key."""
    table = _read_table(output, operator, shard)
    present = table["group"].is_valid().to_numpy()
    groups = b"".join(table["group"].drop_null().to_pylist())
    positions = np.flatnonzero(present).astype(np.int64) | (shard << 32)
    return np.frombuffer(groups, dtype=np.uint64).reshape(-1, 2), table["image_hash"].to_numpy()[present], positions


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
