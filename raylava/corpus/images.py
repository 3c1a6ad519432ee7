"""Bytes → the RGB pixels a person would see → squared and resized as the vision backbone takes them. Pure.

`prepare_image` is what preparation stores; `normalise` is what training and the published processor feed the tower.
"""

import io
import logging
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from raylava.config.recipe import ImageEncoding
from raylava.corpus.quarantine import BadRow, Reason
from raylava.models.registry import PixelRule

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]  # (height, width, 3), RGB


def decode(content: bytes, max_pixels: int) -> Pixels:
    """The image as a person would see it: first frame, upright by EXIF, in RGB, alpha laid on white.

    Raises BadRow when it can't be read, is cut short, or has more than `max_pixels` pixels (checked before decoding).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is the one limit
            image = Image.open(io.BytesIO(content))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadRow(Reason.IMAGE_UNREADABLE, f"{type(error).__name__}: {error}"[:200]) from error
    if image.width * image.height > max_pixels:
        raise BadRow(Reason.IMAGE_TOO_LARGE, f"{image.width}×{image.height} pixels, more than {max_pixels}")
    try:
        pixels = _plain_jpeg(image, content)
        if pixels is None:
            image.load()
            pixels = np.asarray(_as_rgb(ImageOps.exif_transpose(image)))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = Reason.IMAGE_TRUNCATED if "truncated" in str(error).lower() else Reason.IMAGE_UNREADABLE
        raise BadRow(reason, f"{type(error).__name__}: {error}"[:200]) from error
    return pixels


def _plain_jpeg(image: Image.Image, content: bytes) -> Pixels | None:
    """An upright RGB JPEG by simplejpeg: the values that Pillow gives, in half the time. None for all others.

    What simplejpeg refuses (cut short, odd markers) is left to Pillow too, whose errors tell the reasons apart.
    """
    upright = image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    if not upright:
        return None
    try:
        return simplejpeg.decode_jpeg(content, strict=True)
    except ValueError as error:
        logger.debug("simplejpeg: %s", error)
        return None


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _sixteen_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _sixteen_bit(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits by its high byte; `convert` alone would clip everything above 255 to white."""
    values = np.asarray(image, dtype=np.float64)
    top = 65535.0 if values.max(initial=0.0) > 255.0 else 255.0
    grey = np.clip(values * (255.0 / top), 0, 255).astype(np.uint8)
    return Image.fromarray(grey, mode="L").convert("RGB")


def square(pixels: Pixels, rule: PixelRule, fit: str) -> Pixels:
    """(size, size, 3): `pad` to a square in the mean colour and resize, or `crop` the centre of (height, width, 3).

    Bicubic by Pillow, the arithmetic of transformers' LlavaImageProcessorPil, which is the processor we publish.
    """
    return _squared(pixels, rule, fit, _resize_exactly)


def square_fast(pixels: Pixels, rule: PixelRule, fit: str) -> Pixels:
    """`square` by torch's vectorised bicubic: each value within 1 of 255 of Pillow's, in a third of the time.

    For lossy storage, whose own error is two orders of magnitude larger (jobs/bench/README.md has the figures).
    """
    return _squared(pixels, rule, fit, _resize_fast)


def _squared(pixels: Pixels, rule: PixelRule, fit: str, resize: Callable[[Pixels, int, int], Pixels]) -> Pixels:
    if fit == "pad":
        return resize(_pad(pixels, rule), rule.size, rule.size)
    height, width, _ = pixels.shape
    short = min(height, width)
    width, height = int(rule.size * width / short), int(rule.size * height / short)
    left, top = (width - rule.size) // 2, (height - rule.size) // 2
    return resize(pixels, width, height)[top : top + rule.size, left : left + rule.size]


def _pad(pixels: Pixels, rule: PixelRule) -> Pixels:
    height, width, _ = pixels.shape
    if height == width:
        return pixels
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    # Only the bands are painted, whole rows at a time: colouring pixel by pixel took a third of preparation's time.
    band = np.tile(np.asarray(mean_colour(rule), dtype=np.uint8), (side, 1))
    canvas[:top] = canvas[top + height :] = band
    canvas[top : top + height, :left] = band[:left]
    canvas[top : top + height, left + width :] = band[left + width :]
    canvas[top : top + height, left : left + width] = pixels
    return canvas


def _resize_exactly(pixels: Pixels, width: int, height: int) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _resize_fast(pixels: Pixels, width: int, height: int) -> Pixels:
    planes = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def mean_colour(rule: PixelRule) -> tuple[int, int, int]:
    """The backbone's mean as 8-bit RGB: what pads, and what a blank image shows."""
    red, green, blue = (int(channel * 255) for channel in rule.mean)
    return red, green, blue


def encode(pixels: Pixels, store: ImageEncoding) -> bytes:
    """The image in the format that blocks keep."""
    if store.format == "jpeg":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=store.quality, colorsubsampling="444")
    buffer = io.BytesIO()
    if store.format == "webp":
        Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, method=2)
    else:
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def prepare_image(content: bytes, rule: PixelRule, fit: str, store: ImageEncoding, max_pixels: int) -> bytes:
    """A source image's bytes → what a block stores: `size` × `size` RGB, encoded. Raises BadRow."""
    squared = square_fast if store.format == "jpeg" else square
    pixels = decode(content, max_pixels)
    _reject_extreme_aspect_ratio(pixels, rule, fit, max_pixels)
    return encode(squared(pixels, rule, fit), store)


def _reject_extreme_aspect_ratio(pixels: Pixels, rule: PixelRule, fit: str, max_pixels: int) -> None:
    """A image of 60,000 × 1 pixels is small until it is padded to a square, or its short side is scaled up."""
    height, width, _ = pixels.shape
    longest, shortest = max(height, width), min(height, width)
    between = longest**2 if fit == "pad" else rule.size**2 * longest // shortest
    if between > max_pixels:
        detail = f"{width}×{height} would become {between} pixels on the way, more than {max_pixels}"
        raise BadRow(Reason.IMAGE_TOO_LARGE, detail)


def decode_stored(content: bytes) -> Pixels:
    """A image from a block as (size, size, 3) uint8."""
    if content[:2] == b"\xff\xd8":  # JPEG's start-of-image marker
        return simplejpeg.decode_jpeg(content)
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def blank_pixels(rule: PixelRule) -> Pixels:
    """A image of the mean colour, (size, size, 3) uint8: what a text-only pack shows the vision tower."""
    return np.full((rule.size, rule.size, 3), mean_colour(rule), dtype=np.uint8)


def normalise(pixels: Pixels, rule: PixelRule) -> npt.NDArray[np.float32]:
    """(…, size, size, 3) uint8 → (…, 3, size, size) float32, by the backbone's mean and std."""
    mean = np.asarray(rule.mean, dtype=np.float32)
    std = np.asarray(rule.std, dtype=np.float32)
    scaled = (pixels.astype(np.float32) / 255.0 - mean) / std
    return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))
