"""Decoding, resizing and encoding of images; unusable images raise BadRow with a reason."""

import io

import numpy as np
import pytest
from PIL import Image
from transformers import BitImageProcessorPil

from raylava.config.recipe import ImageEncoding
from raylava.corpus.images import (
    blank_pixels,
    decode_block_image,
    decode_image,
    mean_color,
    normalize_pixels,
    prepare_image,
    resize_exact,
    resize_fast,
)
from raylava.corpus.quarantine import BadRow, Reason
from raylava.models.registry import PixelRule

RULE = PixelRule(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
LIMIT = 1_000_000


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def pixel_of(content: bytes) -> tuple[int, int, int]:
    red, green, blue = decode_image(content, LIMIT)[4, 4]
    return int(red), int(green), int(blue)


def animated() -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


DECODED = {
    "palette": (encode(Image.new("RGB", (8, 8), (255, 0, 0)).quantize(4)), (255, 0, 0)),
    "grey": (encode(Image.new("L", (8, 8), 77)), (77, 77, 77)),
    "one bit": (encode(Image.new("1", (8, 8), 1)), (255, 255, 255)),
    "transparent is white": (encode(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), (255, 255, 255)),
    "half transparent is blended": (encode(Image.new("RGBA", (8, 8), (255, 0, 0, 128))), (255, 127, 127)),
    "grey with alpha": (encode(Image.new("LA", (8, 8), (0, 0))), (255, 255, 255)),
    "16 bit": (encode(Image.fromarray(np.full((8, 8), 0x8080, dtype=np.uint16))), (128, 128, 128)),
    "cmyk": (encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), (255, 255, 255)),
    "animated: the first frame": (animated(), (255, 0, 0)),
    "webp": (encode(Image.new("RGB", (8, 8), (0, 0, 255)), "WEBP", lossless=True), (0, 0, 255)),
}


@pytest.mark.parametrize("kind", DECODED)
def test_image_decodes_as_a_viewer_displays_it(kind: str) -> None:
    content, colour = DECODED[kind]
    assert pixel_of(content) == colour


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (20, 10), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    assert decode_image(encode(image, "JPEG", exif=exif), LIMIT).shape == (20, 10, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_decodes_to_the_same_values_as_with_pillow(mode: str, subsampling: str, progressive: bool) -> None:
    content = encode(photo(61, 37).convert(mode), "JPEG", subsampling=subsampling, progressive=progressive)
    assert np.array_equal(decode_image(content, LIMIT), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", Reason.IMAGE_UNREADABLE),
        (b"not an image", Reason.IMAGE_UNREADABLE),
        (encode(photo(256, 256), "JPEG")[:-400], Reason.IMAGE_TRUNCATED),
        (encode(photo(64, 64))[:600], Reason.IMAGE_TRUNCATED),
        (encode(Image.new("1", (4000, 4000))), Reason.IMAGE_TOO_LARGE),
    ],
)
def test_unusable_image_raises_bad_row_with_its_reason(content: bytes, reason: Reason) -> None:
    with pytest.raises(BadRow) as bad:
        decode_image(content, LIMIT)
    assert bad.value.reason == reason


@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_extreme_aspect_ratio_is_rejected(aspect: str) -> None:
    sliver = encode(Image.new("1", (60_000, 1)))
    with pytest.raises(BadRow, match="would become") as bad:
        prepare_image(sliver, RULE, aspect, ImageEncoding(), LIMIT)
    assert bad.value.reason == Reason.IMAGE_TOO_LARGE


def test_padding_keeps_the_whole_image_and_fills_with_the_mean_color() -> None:
    resized = resize_exact(np.asarray(Image.new("RGB", (64, 32), "red")), RULE, "pad")
    assert resized.shape == (32, 32, 3)
    assert tuple(resized[0, 16]) == mean_color(RULE) == (127, 102, 76)
    assert tuple(resized[16, 0]) == tuple(resized[16, 31]) == (255, 0, 0)


def test_cropping_keeps_the_center_of_the_longer_side() -> None:
    image = Image.new("RGB", (96, 32), "blue")
    image.paste("red", (32, 0, 64, 32))
    resized = resize_exact(np.asarray(image), RULE, "crop")
    assert resized.shape == (32, 32, 3)
    assert tuple(resized[16, 16]) == (255, 0, 0)


@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize("size", [(640, 480), (33, 127), (32, 32), (20, 11)])
def test_fast_resize_is_within_one_level_of_the_exact_one(aspect: str, size: tuple[int, int]) -> None:
    image = photo(*size)
    fast, exact = (resize(np.asarray(image), RULE, aspect).astype(int) for resize in (resize_fast, resize_exact))
    assert fast.shape == exact.shape == (32, 32, 3)
    assert np.abs(fast - exact).max() <= 1


@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize("size", [(640, 480), (33, 127), (32, 32), (20, 11)])
def test_resize_size_above_the_image_size_gives_the_pixels_of_the_stock_processor(
    aspect: str, size: tuple[int, int]
) -> None:
    """DINOv2's stock processor: short side to 256, center crop of 224; LLaVA pads to a square before it."""
    rule = PixelRule(28, RULE.mean, RULE.std, resize_size=32)
    image = photo(*size)
    source = image
    if aspect == "pad":
        side = max(size)
        source = Image.new("RGB", (side, side), mean_color(rule))
        source.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    processor = BitImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        resample=Image.Resampling.BICUBIC,
        image_mean=list(rule.mean),
        image_std=list(rule.std),
    )
    expected = processor(source, return_tensors="np")["pixel_values"][0]
    pixels = resize_exact(np.asarray(image), rule, aspect)
    assert pixels.shape == (28, 28, 3)
    np.testing.assert_allclose(normalize_pixels(pixels, rule), expected, atol=1e-5)


@pytest.mark.parametrize("encoding", [ImageEncoding(format="png"), ImageEncoding(format="webp")])
def test_lossless_encoding_preserves_pixels(encoding: ImageEncoding) -> None:
    image = photo(90, 50)
    stored = prepare_image(encode(image), RULE, "pad", encoding, LIMIT)
    assert np.array_equal(decode_block_image(stored), resize_exact(np.asarray(image), RULE, "pad"))


def test_default_encoding_stays_close_to_the_original_pixels() -> None:
    image = photo(640, 480)
    rule = PixelRule(336, RULE.mean, RULE.std)
    stored = prepare_image(encode(image), rule, "pad", ImageEncoding(), LIMIT)
    difference = np.abs(
        decode_block_image(stored).astype(int) - resize_exact(np.asarray(image), rule, "pad").astype(int)
    )
    assert difference.mean() < 2.0  # of 255, on hard noise


def test_normalized_pixels_are_channels_first_with_the_mean_at_zero() -> None:
    pixels = normalize_pixels(blank_pixels(RULE)[None], RULE)
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels.dtype == np.float32
    assert np.abs(pixels).max() < 0.02  # the mean color maps to zero, up to 8-bit rounding
