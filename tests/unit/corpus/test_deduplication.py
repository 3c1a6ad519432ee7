"""Searching for duplicates: equal to comparing all pairs, whatever the number of partitions."""

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from raylava.corpus.deduplication import KeyedRow, Keys, find_duplicates, find_partition, row_verdicts, write_keys
from raylava.corpus.image_hash import difference_hash
from raylava.corpus.operators import DuplicateKey
from raylava.corpus.quarantine import BadRow
from raylava.storage import storage_path

# Few origins, groups and hashes that differ in few bits, so that duplicates are frequent.
KEYS = st.none() | st.builds(
    DuplicateKey,
    group=st.sampled_from([b"a", b"b", b"longer than sixteen bytes, and longer"]),
    image_hash=st.sets(st.integers(0, 63), max_size=4).map(lambda bits: sum(1 << bit for bit in bits)),
)
ROWS = st.lists(st.tuples(st.sampled_from("xyz0123456789"), KEYS), max_size=40).map(
    lambda rows: [KeyedRow(str(number), origin, key) for number, (origin, key) in enumerate(rows)]
)


def duplicates_by_comparing_all_pairs(rows: list[KeyedRow], distance: int) -> set[str]:
    """Of rows with equal keys, all but the first and its copies; of the others, those near an earlier one."""
    first: dict[DuplicateKey, KeyedRow] = {}
    for row in rows:
        if row.key is not None:
            first.setdefault(row.key, row)
    compared = [row for row in rows if row.key is not None and row.origin == first[row.key].origin]
    identical = {row.sample_id for row in rows if row.key is not None and row not in compared}
    near = {
        row.sample_id
        for number, row in enumerate(compared)
        for earlier in compared[:number]
        if row.origin != earlier.origin and are_near(row.key, earlier.key, distance)
    }
    return identical | near


def are_near(key: DuplicateKey | None, other: DuplicateKey | None, distance: int) -> bool:
    assert key is not None
    assert other is not None
    return key.group == other.group and (key.image_hash ^ other.image_hash).bit_count() <= distance


@given(ROWS, st.integers(0, 7), st.integers(1, 5), st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_duplicates_are_those_of_comparing_all_pairs_at_any_number_of_partitions_and_shards(
    rows: list[KeyedRow], distance: int, partitions: int, shard_size: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = storage_path(folder)
        shards = [rows[start : start + shard_size] for start in range(0, len(rows), shard_size)] or [[]]
        for shard, content in enumerate(shards):
            write_keys(output, 2, shard, content)
        for partition in range(partitions):
            find_partition(output, 2, distance, len(shards), partition, partitions)
        verdicts = [row_verdicts(output, 2, "x", shard, partitions) for shard in range(len(shards))]
    assert set().union(*verdicts) == duplicates_by_comparing_all_pairs(rows, distance)
    for content, found in zip(shards, verdicts, strict=True):
        assert found.keys() <= {row.sample_id for row in content}
        assert {str(problem.reason) for problem in found.values()} <= {"filtered by x"}


def test_a_million_distinct_hashes_are_searched_without_comparing_all_pairs() -> None:
    hashes = np.random.default_rng(0).integers(0, 1 << 63, 1_000_000, dtype=np.uint64)
    groups = np.arange(2_000_000, dtype=np.uint64).reshape(-1, 2) % 50_000
    hashes[-1], groups[-1] = hashes[7] ^ np.uint64(0b101), groups[7]
    keys = Keys(np.arange(1_000_000, dtype=np.uint64), groups, hashes)
    assert find_duplicates(keys, 3).tolist() == [999_999]


def test_transparent_images_are_compared_as_they_are_displayed() -> None:
    def drawing(shape: str) -> bytes:
        image = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
        getattr(ImageDraw.Draw(image), shape)((20, 50, 150, 190), fill=(0, 0, 0, 255))
        return encoded(image, "PNG")

    blank = difference_hash(encoded(Image.new("RGB", (200, 200), "white"), "PNG"))
    hashes = [blank, difference_hash(drawing("ellipse")), difference_hash(drawing("rectangle"))]
    assert len(set(hashes)) == 3


def test_image_of_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(BadRow, match="image too large: 320×240 pixels, more than 1000"):
        difference_hash(encoded(photo(0), "PNG"), max_pixels=1000)


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
