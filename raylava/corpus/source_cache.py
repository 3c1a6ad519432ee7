"""What identifies the content of sources, resolved once per process and once per sweep.

Image folders are listed by every command, because an image may have been added; annotation files are read only if
storage has no index of them (see row_index.py).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from raylava.cluster.roles import PREPARE, node_labels_for
from raylava.cluster.session import ray_session
from raylava.config.recipe import Resources
from raylava.corpus.formats import FORMATS
from raylava.corpus.parallel import map_with_ray_data
from raylava.corpus.row_index import AnnotationFile, RowIndexes
from raylava.corpus.sources import SourceFiles, file_sizes
from raylava.errors import UserError
from raylava.storage import StoragePath, storage_path

CLUSTER_BYTES = 256 << 20  # annotations of fewer bytes are indexed sooner than Ray Data starts


class SourceCache:
    """Returns what identifies a source's content. `known` holds the results that another process has computed."""

    def __init__(self, known: Mapping[str, dict[str, Any]] | None = None) -> None:
        self.known = dict(known or {})
        self._indexes: dict[str, RowIndexes] = {}

    def indexes(self, folder: StoragePath) -> RowIndexes:
        """Return the indexes of annotation files that are kept in a folder."""
        return self._indexes.setdefault(folder.uri, RowIndexes(folder))

    def fingerprint_fields(
        self, source: SourceFiles, folder: StoragePath, resources: Resources | None = None
    ) -> dict[str, Any]:
        """Return the hashes of the annotations and of the names and sizes of the images that rows refer to.

        The fields do not depend on the location. `folder` keeps the indexes of annotation files. JSON files are hashed
        completely; Parquet files and tars, which may be terabytes, by their size and last 64 KiB. Raises UserError when
        annotations can't be read or the image folder is missing.
        """
        key = json.dumps([source.source.fingerprint_fields(), source.annotations, source.images])
        if key not in self.known:
            indexes = self.indexes(folder)
            hashed = [file for file in source.annotation_files if FORMATS[file.format].exposes_rows]
            build_indexes(indexes, hashed, resources)
            names = {name for file in source.files for name in source.image_names(file, indexes)}
            images = storage_path(source.images)
            if names and not images.is_folder():
                raise UserError(f"{images}: no such image folder; set the source's images (or data=…)")
            listing = json.dumps(sorted(file_sizes(images, names).items()))
            self.known[key] = {
                "annotations": [source.content_hash(file, indexes) for file in source.files],
                "images": hashlib.sha256(listing.encode()).hexdigest(),
            }
        return self.known[key]


def build_indexes(indexes: RowIndexes, files: Sequence[AnnotationFile], resources: Resources | None = None) -> None:
    """Build the missing indexes of files: on the nodes that prepare corpora, or in this process if they are small.

    Raises UserError for a file that cannot be read, RunError when a worker fails.
    """
    missing = indexes.missing(files)
    if sum(missing.values()) < CLUSTER_BYTES:
        indexes.build(list(missing))
        return
    resources = resources or Resources()
    with ray_session(resources):
        labels = node_labels_for(PREPARE, resources)
        indexes.build(list(missing), lambda function, items: map_with_ray_data("indexing", function, items, labels))
