"""The annotation file formats: LLaVA JSON, JSON Lines, Parquet and WebDataset tars.

`scan` reads a file once, with one row in memory at a time, and yields a reference to each row; `read_rows` reads rows
by reference on any node and transfers only their bytes. rows.py interprets the raw rows.
"""

from raylava.corpus.binary_formats import Parquet, WebDataset
from raylava.corpus.json_formats import JsonLines, LlavaJson
from raylava.corpus.row_format import Format
from raylava.errors import UserError
from raylava.storage import StoragePath

FORMATS: dict[str, Format] = {
    "llava_json": LlavaJson(),
    "jsonl": JsonLines(),
    "parquet": Parquet(),
    "webdataset": WebDataset(),
}
SUFFIXES = {".json": "llava_json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".tar": "webdataset"}

_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")
COMPRESSED_SUFFIXES = (".tgz", *(suffix + compression for suffix in SUFFIXES for compression in _COMPRESSIONS))


def format_of(file: StoragePath) -> str:
    """Return the format that a file's suffix indicates. Raises UserError for an unknown suffix."""
    for suffix, name in SUFFIXES.items():
        if file.name.lower().endswith(suffix):
            return name
    raise UserError(f"{file}: the file name does not indicate its format; set format to one of {', '.join(FORMATS)}")
