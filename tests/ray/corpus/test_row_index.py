"""Large annotation files are indexed by Ray Data tasks on the cluster, not by the driver."""

import json
import os
from pathlib import Path

import pytest
import ray

from raylava.config.recipe import Source
from raylava.corpus import row_index, source_cache
from raylava.corpus.source_cache import SourceCache
from raylava.corpus.sources import SourceFiles
from raylava.errors import UserError
from raylava.storage import storage_path

OLD = 1_700_000_000


@pytest.mark.usefixtures("ray_cluster")
def test_large_files_are_indexed_in_parts_on_the_cluster_and_never_by_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        lines = [json.dumps({"id": f"{name}{number}", "image": f"{number}.png"}) for number in range(3000)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        os.utime(tmp_path / f"{name}.jsonl", (OLD, OLD))
    (tmp_path / "images").mkdir()
    source = SourceFiles(Source(annotations="."), str(tmp_path), str(tmp_path / "images"))
    expected = SourceCache().fingerprint_fields(source, storage_path(tmp_path / "small"))

    monkeypatch.setattr(source_cache, "CLUSTER_BYTES", 1)
    parts: list[int] = []
    map_on_cluster = source_cache.map_with_ray_data

    def record_parts(purpose: str, function: object, items: range, labels: dict[str, str]) -> object:
        parts.extend(items)
        return map_on_cluster(purpose, function, items, labels)  # type: ignore[arg-type]

    def refuse(*arguments: object) -> None:
        raise AssertionError("the driver must not scan a large file")

    monkeypatch.setattr(source_cache, "map_with_ray_data", record_parts)
    monkeypatch.setattr(row_index, "_scan", refuse)  # in this process; workers import the module anew
    assert SourceCache().fingerprint_fields(source, storage_path(tmp_path / "kept")) == expected
    assert parts == [0, 1], "one part a file below PART_BYTES"
    indexes = SourceCache().indexes(storage_path(tmp_path / "kept"))
    assert [row.offset[0] for row in source.selected_rows(0, indexes)][:2] == [0, 31]
    assert sum(1 for _ in source.selected_rows(0, indexes)) == 6000
    assert ray.is_initialized()

    (tmp_path / "b.jsonl").write_text("\n\n")
    os.utime(tmp_path / "b.jsonl", (OLD, OLD))
    with pytest.raises(UserError, match=r"b\.jsonl: contains no rows"):
        SourceCache().fingerprint_fields(source, storage_path(tmp_path / "kept"))
