"""A perceptual hash of images: equal or close for images that look alike, whatever their size, format and quality."""

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from raylava.corpus.images import as_rgb, open_image
from raylava.corpus.quarantine import BadRow, Reason, describe_error

_SIDE = 8  # rows and columns of the hash: 64 bits
_DRAFT_SIDE = 72  # pixels; the JPEG decoder may return any size from here on, which saves most of the decoding


def difference_hash(content: bytes, max_pixels: int = 64_000_000) -> int:
    """Return the 64-bit difference hash (dHash; Krawetz 2013) of an encoded image as a viewer displays it.

    The image is reduced to 9 × 8 grey pixels; each bit tells whether a pixel is darker than its right neighbour. Raises
    BadRow when it cannot be decoded or has more than `max_pixels` pixels, the default of a corpus.
    """
    image = open_image(content, max_pixels)
    try:
        image.draft("L", (_DRAFT_SIDE, _DRAFT_SIDE))
        displayed = as_rgb(ImageOps.exif_transpose(image)).convert("L")
        grey = np.asarray(displayed.resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise exceptions of many kinds for foreign bytes
        raise BadRow(Reason.IMAGE_UNREADABLE, describe_error(error)) from error
    bits = grey[:, :-1] < grey[:, 1:]
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def differing_bits(hashes: npt.NDArray[np.uint64], image_hash: int | np.uint64) -> npt.NDArray[np.uint8]:
    """Return the number of bits in which each of `hashes`, shape (n,), differs from `image_hash`."""
    return np.bitwise_count(hashes ^ np.uint64(image_hash))
