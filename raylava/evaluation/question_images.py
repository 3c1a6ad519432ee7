"""The images of questions as data URIs, downscaled to what a page shows."""

import base64
import io

from PIL import Image

from raylava.corpus.images import decode_image
from raylava.corpus.quarantine import BadRow
from raylava.corpus.row_images import read_image_file
from raylava.errors import first_line
from raylava.storage import StoragePath

MAX_SIDE = 320  # pixels of an image's longer side
_MAX_PIXELS = 64_000_000
_MAX_IMAGE_BYTES = 64_000_000


def inline_image(images: StoragePath, name: str) -> tuple[str, str]:
    """Return (data URI, problem) of an image below the folder `images`: one of them is empty.

    A PNG remains one if it is small, so that its pixels are exact; a larger image becomes a JPEG.
    """
    try:
        content = read_image_file(images, name, _MAX_IMAGE_BYTES)
        image = Image.fromarray(decode_image(content, _MAX_PIXELS))
    except (OSError, BadRow) as problem:
        return "", f"{name}: {problem if isinstance(problem, BadRow) else first_line(problem)}"
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if max(image.size) < MAX_SIDE else "JPEG", quality=85)
    return f"data:image;base64,{base64.b64encode(buffer.getvalue()).decode()}", ""
