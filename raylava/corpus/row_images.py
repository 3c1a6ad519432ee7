"""Reads the image files of a row: bytes within the row, a path below the image folder, or a URL that was fetched."""

import errno
import functools
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import overload

from raylava.corpus.fetch import FetchedImage, fetched_content, is_url
from raylava.corpus.quarantine import BadRow, Reason
from raylava.corpus.rows import resolve_image_path
from raylava.storage import StoragePath


class ImageReader:
    """Reads the images of one source row, each once: operators and the sample may need the same one."""

    def __init__(self, root: StoragePath, max_bytes: int, fetched: Mapping[str, FetchedImage] | None = None) -> None:
        """`root` is the folder of image paths; files of more than `max_bytes` are not read; `fetched` has the images
        that are named by URL.
        """
        self._root, self._max_bytes, self._fetched = root, max_bytes, fetched or {}
        self._contents: dict[str, bytes] = {}

    def __call__(self, image: str | bytes) -> bytes:
        """Return the bytes of an image as a row gives it. Raises BadRow, and OSError when the folder is missing."""
        if isinstance(image, bytes):
            check_size("the image", len(image), self._max_bytes)
            return image
        if image not in self._contents:
            self._contents[image] = (
                fetched_content(image, self._fetched)
                if is_url(image)
                else read_image_file(self._root, image, self._max_bytes)
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


def check_size(name: str, size: int, max_bytes: int) -> None:
    """Raise BadRow for an image file of more than `max_bytes`."""
    if size > max_bytes:
        raise BadRow(Reason.IMAGE_TOO_LARGE, f"{name}: {size} bytes, more than max_image_bytes={max_bytes}")


def read_image_file(root: StoragePath, name: str, max_bytes: int) -> bytes:
    """Read an image below `root`. Raises OSError when `root` itself is missing, else BadRow.

    A BadRow is raised for whatever is wrong with this image: it is missing, has more than `max_bytes` bytes, is a
    folder, pipe or device, or its path or a link leads out of `root`.
    """
    file = _locate(root, name)
    try:
        if root.is_local:
            _reject_special_file(file, name)  # reading a pipe or a device might never end
        with file.filesystem.open_input_file(file.path) as stream:
            check_size(name, stream.size(), max_bytes)
            return stream.read()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise BadRow(Reason.IMAGE_MISSING, f"{name[:100]}…: the name is too long for a file") from error
        if not root.exists():  # the image folder is gone, which is not the fault of this row
            raise
        if isinstance(error, FileNotFoundError):
            raise BadRow(Reason.IMAGE_MISSING, name) from error
        if file.is_folder():
            raise BadRow(Reason.IMAGE_MISSING, f"{name} is a folder") from error
        raise BadRow(Reason.IMAGE_UNREADABLE, f"{name}: {error}"[:200]) from error


def _reject_special_file(file: StoragePath, name: str) -> None:
    mode = os.stat(file.path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise BadRow(Reason.IMAGE_UNREADABLE, f"{name} is not a regular file")


def is_within(root: StoragePath, name: str) -> bool:
    """Return whether no link on the way to an image leads out of a local `root`."""
    try:
        _locate(root, name)
    except BadRow:
        return False
    return True


def _locate(root: StoragePath, name: str) -> StoragePath:
    """Return the location of an image below `root`. Raises BadRow when its path or a link leads out of `root`."""
    file = resolve_image_path(root, name)
    if root.is_local:
        _reject_escaping_link(root, file, name)
    return file


def _reject_escaping_link(root: StoragePath, file: StoragePath, name: str) -> None:
    folder, _, base = file.path.rpartition("/")
    resolved = _real_path(file.path) if os.path.islink(file.path) else _resolve_folder(folder) / base
    if not resolved.is_relative_to(_resolve_folder(root.path)):
        raise BadRow(Reason.PATH_ESCAPES, f"{name} is a link out of the image folder")


@functools.lru_cache(maxsize=4096)
def _resolve_folder(path: str) -> Path:
    """Resolve the links of a folder's path; cached, because resolving takes longer than reading a small image."""
    return _real_path(path)


def _real_path(path: str) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises RuntimeError for links that loop
