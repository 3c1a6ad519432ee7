"""Searching for duplicates: equal to comparing all pairs, whatever the number of partitions."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from raylava.corpus.deduplication import duplicate_ids, find_duplicates, find_partition, write_keys
from raylava.corpus.image_hash import difference_hash
from raylava.corpus.operators import DuplicateKey
from raylava.corpus.quarantine import BadRow
from raylava.storage import storage_path

# Few groups and hashes that differ in few bits, so that duplicates are frequent.
KEYS = st.lists(
    st.none()
    | st.builds(
        DuplicateKey,
        group=st.sampled_from([b"a", b"b", b"longer than sixteen bytes, and longer"]),
        image_hash=st.sets(st.integers(0, 63), max_size=4).map(lambda bits: sum(1 << bit for bit in bits)),
    ),
    max_size=40,
)


def duplicates_by_comparing_all_pairs(keys: list[DuplicateKey | None], distance: int) -> set[str]:
    return {
        str(number)
        for number, key in enumerate(keys)
        for earlier in keys[:number]
        if key is not None
        and earlier is not None
        and key.group == earlier.group
        and (key.image_hash ^ earlier.image_hash).bit_count() <= distance
    }


@given(KEYS, st.integers(0, 7), st.integers(1, 5), st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_duplicates_are_those_of_comparing_all_pairs_at_any_number_of_partitions_and_shards(
    keys: list[DuplicateKey | None], distance: int, partitions: int, shard_size: int
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        output = storage_path(folder)
        names = [(str(number), key) for number, key in enumerate(keys)]
        shards = [names[start : start + shard_size] for start in range(0, len(names), shard_size)] or [[]]
        for shard, content in enumerate(shards):
            write_keys(output, 2, shard, content)
        for partition in range(partitions):
            find_partition(output, 2, distance, len(shards), partition, partitions)
        found = [duplicate_ids(output, 2, shard, partitions) for shard in range(len(shards))]
    assert set().union(*found) == duplicates_by_comparing_all_pairs(keys, distance)
    for shard, ids in zip(shards, found, strict=True):
        assert ids <= {name for name, _ in shard}


def test_a_million_distinct_hashes_are_searched_without_comparing_all_pairs() -> None:
    hashes = np.random.default_rng(0).integers(0, 1 << 63, 1_000_000, dtype=np.uint64)
    groups = np.arange(2_000_000, dtype=np.uint64).reshape(-1, 2) % 50_000
    hashes[-1], groups[-1] = hashes[7] ^ np.uint64(0b101), groups[7]
    assert find_duplicates(groups, hashes, 3).tolist() == [999_999]


def photo(seed: int) -> Image.Image:
    """Return a smooth image, as photographs are."""
    noise = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("seed", range(5))
def test_hash_survives_another_format_quality_size_and_slight_blur_but_not_another_image(seed: int) -> None:
    original = difference_hash(encoded(photo(seed), "PNG"))
    variants = [
        encoded(photo(seed), "JPEG", quality=60),
        encoded(photo(seed).resize((200, 150)), "WEBP"),
        encoded(photo(seed).filter(ImageFilter.GaussianBlur(1)), "JPEG", quality=90),
    ]
    for variant in variants:
        assert (original ^ difference_hash(variant)).bit_count() <= 3
    assert (original ^ difference_hash(encoded(photo(seed + 100), "PNG"))).bit_count() > 12


def test_image_that_cannot_be_decoded_has_no_hash(tmp_path: Path) -> None:
    with pytest.raises(BadRow, match="image unreadable"):
        difference_hash(b"%!PS-Adobe-3.0 EPSF-3.0")
