"""Checks the sources of a corpus before it is prepared: which rows and images preparation would quarantine, and why.

Every row is parsed and every image decoded, as preparation does, but nothing is tokenized or resized. A row whose image
is missing while a file of the same name with another suffix is there (LLaVA-665k names OCR-VQA's GIFs `.jpg`) can be
repaired by a link with the name that the row has.
"""

import functools
import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from raylava.corpus.blocks import encode_csv
from raylava.corpus.crashes import READING, Announce, Crashes, announce_nothing, refuse_crashed, shard_attempt
from raylava.corpus.fetch import is_url
from raylava.corpus.images import decode_image, image_format
from raylava.corpus.parallel import MapOnCluster
from raylava.corpus.quarantine import BadRow, Reason, describe_error
from raylava.corpus.row_format import IMAGE_SUFFIXES
from raylava.corpus.row_images import ImageReader
from raylava.corpus.row_index import RowIndexes
from raylava.corpus.rows import image_names, parse_row, resolve_image_path, sample_id
from raylava.corpus.shards import PrepareSpec, RawRow, read_shard, stage_rows
from raylava.progress import ProgressBar
from raylava.storage import StoragePath, storage_path

logger = logging.getLogger(__name__)

MISNAMED = "image suffix differs"  # a remark: the content decides, so that nothing is quarantined
_SUFFIXES = {
    "JPEG": ("jpg", "jpeg"),
    "MPO": ("jpg", "jpeg", "mpo"),
    "TIFF": ("tif", "tiff"),
}  # of the formats that have two


@dataclass(frozen=True)
class Finding:
    """What is wrong with a row, or with one of its images. `file` is the annotation file, `row` counts from 0.

    `repair` is the path of the file that a link could give the name of the missing `image`, below the image folder.
    """

    source: int
    file: str
    row: int
    sample_id: str
    image: str
    reason: str
    detail: str
    repair: str = ""


@dataclass(frozen=True)
class SourceCheck:
    """The counts of all sources of a corpus, and the findings in the order of the rows."""

    rows: int
    images: int
    by_url: int
    findings: tuple[Finding, ...]

    def counts(self) -> Counter[tuple[str, str]]:
        """Return the number of findings by (annotation file, reason)."""
        return Counter((finding.file, finding.reason) for finding in self.findings)

    def to_csv(self) -> bytes:
        """Return the findings as CSV, with cells that no spreadsheet takes for a formula."""
        return encode_csv(self.findings, Finding)


def check_sources(
    spec: PrepareSpec, folder: StoragePath, indexes: RowIndexes, bar: ProgressBar, map_on_cluster: MapOnCluster
) -> SourceCheck:
    """Check the selected rows of a corpus in parallel. References to the rows are staged below `folder`, and removed.

    Raises UserError for annotations that cannot be read.
    """
    staged = folder / f"inspect-{uuid.uuid4().hex[:8]}"
    spec = replace(spec, output=staged.uri)
    try:
        rows, shards = stage_rows(spec, staged, indexes)
        found: dict[int, dict[str, Any]] = {}
        for result in map_on_cluster(functools.partial(check_shard, spec), range(shards)):
            found[int(result["shard"])] = result
            bar.update(sum(result["rows"] for result in found.values()), rows)
    finally:
        staged.delete()
    results = [found[shard] for shard in sorted(found)]
    findings = (Finding(**entry) for result in results for entry in json.loads(result["findings"]))
    images, by_url = (sum(int(result[name]) for result in results) for name in ("images", "by_url"))
    return SourceCheck(rows, images, by_url, tuple(findings))


def check_shard(spec: PrepareSpec, shard: int) -> dict[str, Any]:
    """Check the rows of one shard; return its counts, and the findings as JSON. Rows that crash are found, too."""
    check_rows = functools.partial(_check_rows, spec, shard)
    with shard_attempt(storage_path(spec.output), shard, "check", check_rows) as crashes:
        return check_rows(crashes)


def _check_rows(
    spec: PrepareSpec, shard: int, crashes: Crashes, announce: Announce = announce_nothing
) -> dict[str, Any]:
    findings: list[Finding] = []
    rows = images = by_url = 0
    announce(READING)
    for raw in read_shard(spec, shard):
        rows += 1
        announce(raw.position)
        suffix = raw.selected.id_suffix
        try:
            refuse_crashed(raw.position, crashes)
            row = parse_row(raw.content, suffix)
        except BadRow as bad:
            names = " ".join(image_names(raw.content))
            findings.append(_finding(raw, sample_id(raw.content, suffix), names, bad.reason, bad.detail))
            continue
        urls = [image for image in row.images if isinstance(image, str) and is_url(image)]
        by_url += len(urls)
        images += len(row.images) - len(urls)
        reader = ImageReader(raw.image_root, spec.corpus.max_image_bytes)
        others = (image for image in row.images if image not in urls)
        findings += _image_findings(raw, row.sample_id, others, reader, spec.corpus.max_pixels)
        announce(READING)
    encoded = json.dumps([asdict(finding) for finding in findings])
    return {"shard": shard, "rows": rows, "images": images, "by_url": by_url, "findings": encoded}


def _image_findings(
    raw: RawRow, sample_id: str, images: Iterator[str | bytes], reader: ImageReader, max_pixels: int
) -> Iterator[Finding]:
    for image in images:
        name = image if isinstance(image, str) else "(within the row)"
        try:
            content = reader(image)
            decode_image(content, max_pixels)
        except BadRow as bad:
            repair = _same_stem(raw.image_root, name) if bad.reason == Reason.IMAGE_MISSING else ""
            yield _finding(raw, sample_id, name, bad.reason, bad.detail, repair)
        except (OSError, MemoryError):  # of more than this row
            raise
        except Exception as error:
            yield _finding(raw, sample_id, name, Reason.FAILED, describe_error(error))
        else:
            if isinstance(image, str) and (remark := _suffix_remark(image, content)):
                yield _finding(raw, sample_id, name, MISNAMED, remark)


def _finding(raw: RawRow, sample_id: str, image: str, reason: str, detail: str, repair: str = "") -> Finding:
    selected = raw.selected
    return Finding(selected.source, raw.file.name, selected.row, sample_id, image, str(reason), detail, repair)


def _suffix_remark(name: str, content: bytes) -> str:
    """Return which format a file has if its suffix names another one."""
    suffix, actual_format = name.rpartition(".")[2].lower(), image_format(content)
    return "" if suffix in _SUFFIXES.get(actual_format, (actual_format.lower(),)) else f"a {actual_format} file"


def _same_stem(root: StoragePath, name: str) -> str:
    """Return the only image below `root` whose name differs from a missing one in its suffix or case, else nothing."""
    folder, _, base = name.rpartition("/")
    stem = base.rpartition(".")[0].lower()
    candidates = _images_by_stem(resolve_image_path(root, folder).uri).get(stem, ())
    return f"{folder}/{candidates[0]}".lstrip("/") if len(candidates) == 1 else ""


@functools.lru_cache(maxsize=64)
def _images_by_stem(folder: str) -> dict[str, list[str]]:
    by_stem: dict[str, list[str]] = {}
    for file in storage_path(folder).children():
        stem, _, suffix = file.name.rpartition(".")
        if suffix.lower() in IMAGE_SUFFIXES:
            by_stem.setdefault(stem.lower(), []).append(file.name)
    return by_stem


def repair_images(check: SourceCheck, image_roots: list[str]) -> int:
    """Link the files that findings name as repairs to the missing names; return the number of links.

    `image_roots` has the image folder of each source; folders in buckets are left as they are. A link that cannot be
    made is logged.
    """
    repaired = 0
    for finding in check.findings:
        root = storage_path(image_roots[finding.source])
        if not finding.repair or not root.is_local:
            continue
        target = resolve_image_path(root, finding.image).path
        if os.path.lexists(target):  # another row names the same image
            continue
        try:
            os.link(resolve_image_path(root, finding.repair).path, target)
            repaired += 1
        except OSError as error:
            logger.warning("%s: cannot be linked to %s (%s)", finding.image, finding.repair, error.strerror)
    return repaired
