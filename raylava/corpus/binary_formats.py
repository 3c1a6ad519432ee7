"""Parquet tables and WebDataset tars, whose rows may contain images."""

import itertools
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raylava.corpus.quarantine import BadRow, Reason, describe_error
from raylava.corpus.row_format import IMAGE_SUFFIXES, LONGEST_MAGIC, Part, RowRef, check_encoding, parse_json, read_span
from raylava.corpus.rows import ROW_FIELDS
from raylava.errors import RunError, UserError, first_line
from raylava.storage import READ_BYTES, StoragePath

_ROWS_PER_BATCH = 64


class Parquet:
    """Parquet tables, including Hugging Face `datasets` exports; images may be embedded in the rows."""

    exposes_rows = False
    can_split = False

    def scan(self, file: StoragePath, part: Part | None = None) -> Iterator[RowRef]:
        """See Format."""
        try:
            metadata = pq.read_metadata(file.path, filesystem=file.filesystem)
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not Parquet ({first_line(error)})") from error
        if not {"conversations", "messages"} & set(metadata.schema.to_arrow_schema().names):
            raise UserError(f"{file}: has neither a `conversations` nor a `messages` column")
        for group in range(metadata.num_row_groups):
            for row in range(metadata.row_group(group).num_rows):
                yield RowRef([group, row])

    def read_rows(self, file: StoragePath, offsets: Sequence[Any], max_image_bytes: int | None = None) -> Iterator[Any]:
        """See Format."""
        place = str(file)
        try:
            # Column chunks are read in pieces, and rows in batches: a row group with images may exceed the memory.
            source = file.filesystem.open_input_file(file.path)
            with source, pq.ParquetFile(source, pre_buffer=False, buffer_size=READ_BYTES) as parquet:
                columns = [name for name in parquet.schema_arrow.names if name in ROW_FIELDS]
                for group, group_offsets in itertools.groupby(offsets, key=lambda offset: offset[0]):
                    place = f"{file}: row group {group}"
                    yield from _read_group(parquet, group, [row for _, row in group_offsets], columns)
        except (pa.ArrowException, OSError) as error:
            raise RunError(f"{place} cannot be read ({first_line(error)})") from error


def _read_group(parquet: pq.ParquetFile, group: int, rows: Sequence[int], columns: Sequence[str]) -> Iterator[Any]:
    """Yield rows of a row group, given by increasing numbers that may repeat."""
    batches = parquet.iter_batches(_ROWS_PER_BATCH, row_groups=[group], columns=columns, use_threads=False)
    batch, start = next(batches), 0
    for row in rows:
        while row >= start + len(batch):
            start += len(batch)
            batch = next(batches)
        try:
            yield batch.slice(row - start, 1).to_pylist()[0]
        except ValueError as error:  # text that is not UTF-8
            yield f"cannot be read: {describe_error(error)}"


class WebDataset:
    """Tars of samples: members whose names are equal up to the first dot. `.json` is the row, or `.txt` a caption."""

    exposes_rows = False
    can_split = False

    def scan(self, file: StoragePath, part: Part | None = None) -> Iterator[RowRef]:
        """See Format."""
        sample: dict[str, Any] = {}
        try:
            with file.open_random() as stream:
                check_encoding(file, stream.read(LONGEST_MAGIC) or b"")
                stream.seek(0)
                with tarfile.open(fileobj=stream, mode="r:") as tar:
                    for member in (member for member in tar if not member.isdir()):
                        name, suffix = _split_name(member.name)
                        if sample and name != sample["key"]:
                            yield RowRef(sample)
                            sample = {}
                        sample = sample or {"key": name, "members": {}}
                        _add_member(sample, suffix, member)
                    _check_end(file, stream, tar.offset)
        except (tarfile.TarError, ValueError) as error:  # ValueError: headers that are none
            raise UserError(f"{file}: not a tar, or truncated ({first_line(error)})") from error
        if not sample:
            raise UserError(f"{file}: contains no samples")
        yield RowRef(sample)

    def read_rows(self, file: StoragePath, offsets: Sequence[Any], max_image_bytes: int | None = None) -> Iterator[Any]:
        """See Format."""
        with file.open_random() as stream:
            for offset in offsets:
                if "problem" in offset:
                    yield f"{offset['key']}: {offset['problem']}"
                    continue
                spans = offset["members"]
                large = [suffix for suffix, (_, size) in spans.items() if max_image_bytes and size > max_image_bytes]
                if any(map(_is_image, large)):
                    size = max(spans[suffix][1] for suffix in large)
                    detail = f"{offset['key']}: {size} bytes, more than max_image_bytes={max_image_bytes}"
                    yield BadRow(Reason.IMAGE_TOO_LARGE, detail)
                    continue
                members = {suffix: read_span(stream, span) for suffix, span in spans.items()}
                cut = [suffix for suffix, (_, size) in spans.items() if len(members[suffix]) < size]
                yield f"{offset['key']}: its {cut[0]} is cut off" if cut else self._row(offset["key"], members)

    def _row(self, key: str, members: dict[str, bytes]) -> Any:
        images = [content for suffix, content in sorted(members.items()) if _is_image(suffix)]
        if "json" in members:
            raw = parse_json(members["json"])
            if isinstance(raw, dict):
                raw = {"id": key, **raw}
                if images:
                    raw["image"] = images
            return raw
        if "txt" in members and images:
            caption = members["txt"].decode("utf-8", errors="replace")
            turns = [{"from": "human", "value": "<image>" * len(images)}, {"from": "gpt", "value": caption}]
            return {"id": key, "image": images, "conversations": turns}
        return f"{key}: has neither .json nor .txt with an image, only {', '.join(sorted(members))}"


def _check_end(file: StoragePath, stream: Any, offset: int) -> None:
    """Raise UserError unless a tar has nothing but zeros from `offset` on, where tarfile found no further header.

    It takes a damaged header, and the end of the first of two concatenated tars, for the end of the file.
    """
    stream.seek(offset)
    while content := stream.read(READ_BYTES):
        if content.strip(b"\0"):
            raise UserError(
                f"{file}: a damaged header at byte {offset}, or a second tar after it; write the file again as one tar"
            )


def _add_member(sample: dict[str, Any], suffix: str, member: tarfile.TarInfo) -> None:
    """Add a member to a sample, or the problem that makes the sample unreadable."""
    if member.issparse():
        sample["problem"] = f"its {suffix} is stored as a sparse file, which is not supported"
    elif not member.isreg():
        sample["problem"] = f"its {suffix} is a link or device, not a file"
    elif suffix in sample["members"]:
        sample["problem"] = f"has two files {suffix}"
    else:
        sample["members"][suffix] = [member.offset_data, member.size]


def _split_name(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _is_image(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in IMAGE_SUFFIXES
