"""Reads the image files of a row: bytes within the row, a path below the image folder, or a URL that was fetched."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import overload

from raylava.corpus.fetch import FetchedImage, fetched_content, is_url
from raylava.corpus.quarantine import BadRow, Reason
from raylava.corpus.rows import resolve_image_path
from raylava.storage import StoragePath


class ImageReader:
    """Reads the images of one source row, each once: operators and the sample may need the same one."""

    def __init__(self, root: StoragePath, fetched: Mapping[str, FetchedImage] | None = None) -> None:
        """`root` is the folder of image paths; `fetched` has the images that are named by URL."""
        self._root, self._fetched = root, fetched or {}
        self._contents: dict[str, bytes] = {}

    def __call__(self, image: str | bytes) -> bytes:
        """Return the bytes of an image as a row gives it. Raises BadRow, and OSError when the folder is missing."""
        if isinstance(image, bytes):
            return image
        if image not in self._contents:
            self._contents[image] = (
                fetched_content(image, self._fetched) if is_url(image) else _read_file(self._root, image)
            )
        return self._contents[image]


class RowImages(Sequence[bytes]):
    """The encoded images of a row as a sequence; an image is read when it is first used."""

    def __init__(self, images: Sequence[str | bytes], read_image: Callable[[str | bytes], bytes]) -> None:
        self._images, self._read_image = images, read_image

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        """Return one image or several. Raises BadRow and OSError like ImageReader."""
        if isinstance(index, slice):
            return [self._read_image(image) for image in self._images[index]]
        return self._read_image(self._images[index])


def _read_file(root: StoragePath, name: str) -> bytes:
    """Read an image below `root`. Raises OSError when `root` itself is missing, else BadRow."""
    file = resolve_image_path(root, name)
    if root.is_local:
        _reject_escaping_link(root, file, name)
    try:
        return file.read_bytes()
    except OSError as error:
        if not root.exists():  # the image folder is gone, which is not the fault of this row
            raise
        if isinstance(error, FileNotFoundError):
            raise BadRow(Reason.IMAGE_MISSING, name) from error
        if file.is_folder():
            raise BadRow(Reason.IMAGE_MISSING, f"{name} is a folder") from error
        raise BadRow(Reason.IMAGE_UNREADABLE, f"{name}: {error}"[:200]) from error


def _reject_escaping_link(root: StoragePath, file: StoragePath, name: str) -> None:
    folder, _, base = file.path.rpartition("/")
    resolved = Path(file.path).resolve() if os.path.islink(file.path) else _resolve_folder(folder) / base
    if not resolved.is_relative_to(_resolve_folder(root.path)):
        raise BadRow(Reason.PATH_ESCAPES, f"{name} is a link out of the image folder")


@functools.lru_cache(maxsize=4096)
def _resolve_folder(path: str) -> Path:
    """Resolve the links of a folder's path; cached, because resolving takes longer than reading a small image."""
    return Path(path).resolve()
