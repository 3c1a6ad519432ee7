"""Bytes → the RGB pixels a person would see → squared and resized as the vision backbone takes them. Pure.

`prepare_picture` is what preparation stores; `normalise` is what training and the published processor feed the tower.
"""

import io
import warnings

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from raylava.corpus.quarantine import BadRow, Reason
from raylava.model.backbones import PixelRule
from raylava.recipe import Storing

Pixels = npt.NDArray[np.uint8]  # (height, width, 3), RGB


def decode(content: bytes, max_pixels: int) -> Image.Image:
    """The picture as a person would see it: first frame, upright by EXIF, in RGB, alpha laid on white.

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
        image.load()
        return _as_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = Reason.IMAGE_TRUNCATED if "truncated" in str(error).lower() else Reason.IMAGE_UNREADABLE
        raise BadRow(reason, f"{type(error).__name__}: {error}"[:200]) from error


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


def square(image: Image.Image, rule: PixelRule, fit: str) -> Image.Image:
    """`size` × `size` pixels: `pad` to a square in the mean colour and resize, or `crop` the centre.

    Bicubic by Pillow, the arithmetic of transformers' LlavaImageProcessorPil, which is the processor we publish.
    """
    if fit == "pad":
        return _pad(image, rule).resize((rule.size, rule.size), Image.Resampling.BICUBIC)
    short = min(image.size)
    width, height = (int(rule.size * side / short) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - rule.size) // 2, (height - rule.size) // 2
    return resized.crop((left, top, left + rule.size, top + rule.size))


def _pad(image: Image.Image, rule: PixelRule) -> Image.Image:
    if image.width == image.height:
        return image
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), mean_colour(rule))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def square_fast(image: Image.Image, rule: PixelRule, fit: str) -> Image.Image:
    """`square` by torch's vectorised bicubic: each value within 1 of 255 of Pillow's, in about half the time.

    For lossy storage, whose own error is two orders of magnitude larger (jobs/bench/README.md has the figures).
    """
    pixels = np.asarray(image)
    if fit == "pad":
        return _resized(_pad_array(pixels, rule), rule.size, rule.size)
    short = min(image.size)
    width, height = (int(rule.size * side / short) for side in image.size)
    left, top = (width - rule.size) // 2, (height - rule.size) // 2
    return _resized(pixels, width, height).crop((left, top, left + rule.size, top + rule.size))


def _pad_array(pixels: Pixels, rule: PixelRule) -> Pixels:
    height, width, _ = pixels.shape
    if height == width:
        return pixels
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    canvas = np.empty((side, side, 3), dtype=np.uint8)
    canvas[:] = mean_colour(rule)
    canvas[top : top + height, left : left + width] = pixels
    return canvas


def _resized(pixels: Pixels, width: int, height: int) -> Image.Image:
    planes = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return Image.fromarray(resized[0].permute(1, 2, 0).contiguous().numpy())


def mean_colour(rule: PixelRule) -> tuple[int, int, int]:
    """The backbone's mean as 8-bit RGB: what pads, and what a blank picture shows."""
    red, green, blue = (int(channel * 255) for channel in rule.mean)
    return red, green, blue


def encode(image: Image.Image, store: Storing) -> bytes:
    """The picture in the format that blocks keep."""
    buffer = io.BytesIO()
    if store.format == "jpeg":
        image.save(buffer, "JPEG", quality=store.quality, subsampling=0)
    elif store.format == "webp":
        image.save(buffer, "WEBP", lossless=True, method=2)
    else:
        image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def prepare_picture(content: bytes, rule: PixelRule, fit: str, store: Storing, max_pixels: int) -> bytes:
    """A source picture's bytes → what a block stores: `size` × `size` RGB, encoded. Raises BadRow."""
    squared = square_fast if store.format == "jpeg" else square
    image = decode(content, max_pixels)
    _refuse_sliver(image, rule, fit, max_pixels)
    return encode(squared(image, rule, fit), store)


def _refuse_sliver(image: Image.Image, rule: PixelRule, fit: str, max_pixels: int) -> None:
    """A picture of 60,000 × 1 pixels is small until it is padded to a square, or its short side is scaled up."""
    longest, shortest = max(image.size), min(image.size)
    between = longest**2 if fit == "pad" else rule.size**2 * longest // shortest
    if between > max_pixels:
        detail = f"{image.width}×{image.height} would become {between} pixels on the way, more than {max_pixels}"
        raise BadRow(Reason.IMAGE_TOO_LARGE, detail)


def decode_stored(content: bytes) -> Pixels:
    """A picture from a block as (size, size, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def blank_pixels(rule: PixelRule) -> Pixels:
    """A picture of the mean colour, (size, size, 3) uint8: what a text-only pack shows the vision tower."""
    return np.full((rule.size, rule.size, 3), mean_colour(rule), dtype=np.uint8)


def normalise(pixels: Pixels, rule: PixelRule) -> npt.NDArray[np.float32]:
    """(…, size, size, 3) uint8 → (…, 3, size, size) float32, by the backbone's mean and std."""
    mean = np.asarray(rule.mean, dtype=np.float32)
    std = np.asarray(rule.std, dtype=np.float32)
    scaled = (pixels.astype(np.float32) / 255.0 - mean) / std
    return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))
