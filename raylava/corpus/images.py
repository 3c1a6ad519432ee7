"""Image preprocessing: decode to RGB, pad or crop to a square, resize to the backbone's resolution, encode. Pure.

`prepare_image` produces what blocks store; `normalize_pixels` produces the input of the vision tower from it, with the
arithmetic of the exported Hugging Face processor.
"""

import io
import logging
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps

from raylava.config.recipe import ImageEncoding
from raylava.corpus.quarantine import BadRow, Reason, describe_error
from raylava.models.registry import PixelRule

logger = logging.getLogger(__name__)

# Pillow has decoders for many more, some of which start other programs (Ghostscript for EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

Pixels = npt.NDArray[np.uint8]  # (height, width, 3), RGB


def decode_image(content: bytes, max_pixels: int) -> Pixels:
    """Decode an image file as a viewer displays it: first frame, upright by EXIF, RGB, alpha composited over white.

    Raises BadRow when it is unreadable, truncated, not of a format in _FORMATS, or has more than `max_pixels` pixels
    (checked before decoding).
    """
    image = open_image(content, max_pixels)
    try:
        pixels = _decode_plain_jpeg(image, content)
        if pixels is None:
            image.load()
            pixels = np.asarray(as_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:
        raise _unreadable(error) from error
    return pixels


def open_image(content: bytes, max_pixels: int) -> Image.Image:
    """Open an image file without decoding it.

    Raises BadRow when it is unreadable, not of a format in _FORMATS, or has more than `max_pixels` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is the limit instead
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except Exception as error:  # decoders raise exceptions of many kinds for foreign bytes
        raise _unreadable(error) from error
    if image.width * image.height > max_pixels:
        raise BadRow(Reason.IMAGE_TOO_LARGE, f"{image.width}×{image.height} pixels, more than {max_pixels}")
    return image


def image_format(content: bytes) -> str:
    """Return which of the formats in _FORMATS an image file has. Raises BadRow like `open_image`."""
    return open_image(content, max_pixels=2**62).format or ""


def _unreadable(error: Exception) -> BadRow:
    """Return the reason for which an image cannot be decoded. Raises MemoryError, which concerns more than the row."""
    if isinstance(error, MemoryError):
        raise error
    reason = Reason.IMAGE_TRUNCATED if "truncated" in str(error).lower() else Reason.IMAGE_UNREADABLE
    return BadRow(reason, describe_error(error))


def _decode_plain_jpeg(image: Image.Image, content: bytes) -> Pixels | None:
    """Decode an upright RGB JPEG with simplejpeg, which gives Pillow's values in half the time. None for all others.

    None is also returned for files that simplejpeg rejects (truncated, odd markers): Pillow's errors distinguish the
    reasons.
    """
    is_plain = image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    if not is_plain:
        return None
    try:
        return simplejpeg.decode_jpeg(content, strict=True)
    except ValueError as error:
        logger.debug("simplejpeg rejected an image, falling back to Pillow: %s", error)
        return None


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB, with alpha composited over white and 16-bit grey scaled to 8 bits."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit (or float) grey to 8 bits; `convert` alone would clip values above 255 to white."""
    values = np.asarray(image, dtype=np.float64)
    top = 65535.0 if values.max(initial=0.0) > 255.0 else 255.0
    grey = np.clip(values * (255.0 / top), 0, 255).astype(np.uint8)
    return Image.fromarray(grey, mode="L").convert("RGB")


def resize_exact(pixels: Pixels, rule: PixelRule, aspect: str) -> Pixels:
    """Resize (height, width, 3) pixels to (size, size, 3), bit-equal to the exported processor.

    `aspect` is "pad" (pad to a square with the mean color) or "crop" (crop the center square). The side, or the short
    side, becomes `rule.resized` pixels, of which the center is kept. Uses Pillow's bicubic filter, as transformers'
    LlavaImageProcessorPil does.
    """
    return _resize_square(pixels, rule, aspect, _bicubic_pillow)


def resize_fast(pixels: Pixels, rule: PixelRule, aspect: str) -> Pixels:
    """`resize_exact` with torch's vectorized bicubic filter, in a third of the time.

    Each value is within 1 (of 255) of Pillow's. Meant for lossy storage, whose own error is two orders of magnitude
    larger (measured in jobs/bench/README.md).
    """
    return _resize_square(pixels, rule, aspect, _bicubic_torch)


def _resize_square(
    pixels: Pixels, rule: PixelRule, aspect: str, resize: Callable[[Pixels, int, int], Pixels]
) -> Pixels:
    if aspect == "pad":
        return _center_crop(resize(_pad(pixels, rule), rule.resized, rule.resized), rule.size)
    height, width, _ = pixels.shape
    short = min(height, width)
    width, height = int(rule.resized * width / short), int(rule.resized * height / short)
    return _center_crop(resize(pixels, width, height), rule.size)


def _center_crop(pixels: Pixels, size: int) -> Pixels:
    height, width, _ = pixels.shape
    left, top = (width - size) // 2, (height - size) // 2
    return pixels[top : top + size, left : left + size]


def _pad(pixels: Pixels, rule: PixelRule) -> Pixels:
    """Center the image on a square canvas of the mean color."""
    height, width, _ = pixels.shape
    if height == width:
        return pixels
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    # Fill only the padding, whole rows at a time: filling the whole canvas by pixel took a third of preparation time.
    band = np.tile(np.asarray(mean_color(rule), dtype=np.uint8), (side, 1))
    canvas[:top] = canvas[top + height :] = band
    canvas[top : top + height, :left] = band[:left]
    canvas[top : top + height, left + width :] = band[left + width :]
    canvas[top : top + height, left : left + width] = pixels
    return canvas


def _bicubic_pillow(pixels: Pixels, width: int, height: int) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _bicubic_torch(pixels: Pixels, width: int, height: int) -> Pixels:
    planes = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def mean_color(rule: PixelRule) -> tuple[int, int, int]:
    """Return the backbone's mean as 8-bit RGB, the color of padding and of blank images."""
    red, green, blue = (int(channel * 255) for channel in rule.mean)
    return red, green, blue


def encode_image(pixels: Pixels, encoding: ImageEncoding) -> bytes:
    """Encode an image in the format that blocks store."""
    if encoding.format == "jpeg":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=encoding.quality, colorsubsampling="444")
    buffer = io.BytesIO()
    if encoding.format == "webp":
        Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, method=2)
    else:
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def prepare_image(content: bytes, rule: PixelRule, aspect: str, encoding: ImageEncoding, max_pixels: int) -> bytes:
    """Convert a source image file to the encoded `size` × `size` RGB image that a block stores. Raises BadRow."""
    resize = resize_fast if encoding.format == "jpeg" else resize_exact
    pixels = decode_image(content, max_pixels)
    _reject_extreme_aspect_ratio(pixels, rule, aspect, max_pixels)
    return encode_image(resize(pixels, rule, aspect), encoding)


def _reject_extreme_aspect_ratio(pixels: Pixels, rule: PixelRule, aspect: str, max_pixels: int) -> None:
    """Raise BadRow when an intermediate image would exceed `max_pixels` pixels.

    An image of 60,000 × 1 pixels is small until it is padded to a square or its short side is scaled up.
    """
    height, width, _ = pixels.shape
    longest, shortest = max(height, width), min(height, width)
    intermediate = longest**2 if aspect == "pad" else rule.resized**2 * longest // shortest
    if intermediate > max_pixels:
        detail = f"{width}×{height} would become {intermediate} pixels while resizing, more than {max_pixels}"
        raise BadRow(Reason.IMAGE_TOO_LARGE, detail)


def decode_block_image(content: bytes) -> Pixels:
    """Decode an image from a block to (size, size, 3) uint8."""
    if content[:2] == b"\xff\xd8":  # JPEG's start-of-image marker
        return simplejpeg.decode_jpeg(content)
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def blank_pixels(rule: PixelRule) -> Pixels:
    """Return a (size, size, 3) uint8 image of the mean color: the vision tower's input for a text-only pack."""
    return np.full((rule.size, rule.size, 3), mean_color(rule), dtype=np.uint8)


def normalize_pixels(pixels: Pixels, rule: PixelRule) -> npt.NDArray[np.float32]:
    """Normalize (…, size, size, 3) uint8 to (…, 3, size, size) float32 by the backbone's mean and std."""
    mean = np.asarray(rule.mean, dtype=np.float32)
    std = np.asarray(rule.std, dtype=np.float32)
    scaled = (pixels.astype(np.float32) / 255.0 - mean) / std
    return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))
