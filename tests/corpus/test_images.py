"""Any image becomes the RGB a person would see, squared as the processor does it, or is refused with a reason."""

import io

import numpy as np
import pytest
from PIL import Image

from raylava.config.recipe import ImageEncoding
from raylava.corpus.images import (
    blank_pixels,
    decode,
    decode_stored,
    mean_colour,
    normalise,
    prepare_image,
    square,
    square_fast,
)
from raylava.corpus.quarantine import BadRow, Reason
from raylava.models.registry import PixelRule

RULE = PixelRule(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
LIMIT = 1_000_000


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def colour_of(content: bytes) -> tuple[int, int, int]:
    red, green, blue = decode(content, LIMIT)[4, 4]
    return int(red), int(green), int(blue)


def animated() -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


AS_SEEN = {
    "palette": (encoded(Image.new("RGB", (8, 8), (255, 0, 0)).quantize(4)), (255, 0, 0)),
    "grey": (encoded(Image.new("L", (8, 8), 77)), (77, 77, 77)),
    "one bit": (encoded(Image.new("1", (8, 8), 1)), (255, 255, 255)),
    "transparent is white": (encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), (255, 255, 255)),
    "half transparent is blended": (encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 128))), (255, 127, 127)),
    "grey with alpha": (encoded(Image.new("LA", (8, 8), (0, 0))), (255, 255, 255)),
    "16 bit": (encoded(Image.fromarray(np.full((8, 8), 0x8080, dtype=np.uint16))), (128, 128, 128)),
    "cmyk": (encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), (255, 255, 255)),
    "animated: the first frame": (animated(), (255, 0, 0)),
    "webp": (encoded(Image.new("RGB", (8, 8), (0, 0, 255)), "WEBP", lossless=True), (0, 0, 255)),
}


@pytest.mark.parametrize("kind", AS_SEEN)
def test_a_image_is_decoded_as_a_person_sees_it(kind: str) -> None:
    content, colour = AS_SEEN[kind]
    assert colour_of(content) == colour


def test_exif_orientation_turns_the_image_upright() -> None:
    image = Image.new("RGB", (20, 10), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    assert decode(encoded(image, "JPEG", exif=exif), LIMIT).shape == (20, 10, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_has_the_values_that_pillow_gives(mode: str, subsampling: str, progressive: bool) -> None:
    content = encoded(photo(61, 37).convert(mode), "JPEG", subsampling=subsampling, progressive=progressive)
    assert np.array_equal(decode(content, LIMIT), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", Reason.IMAGE_UNREADABLE),
        (b"not a image", Reason.IMAGE_UNREADABLE),
        (encoded(photo(256, 256), "JPEG")[:-400], Reason.IMAGE_TRUNCATED),
        (encoded(photo(64, 64))[:600], Reason.IMAGE_TRUNCATED),
        (encoded(Image.new("1", (4000, 4000))), Reason.IMAGE_TOO_LARGE),
    ],
)
def test_a_image_that_cannot_be_used_is_refused_with_its_reason(content: bytes, reason: Reason) -> None:
    with pytest.raises(BadRow) as bad:
        decode(content, LIMIT)
    assert bad.value.reason == reason


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_a_sliver_that_would_be_squared_into_a_bomb_is_refused(fit: str) -> None:
    sliver = encoded(Image.new("1", (60_000, 1)))
    with pytest.raises(BadRow, match="would become") as bad:
        prepare_image(sliver, RULE, fit, ImageEncoding(), LIMIT)
    assert bad.value.reason == Reason.IMAGE_TOO_LARGE


def test_padding_keeps_the_whole_image_and_fills_with_the_mean_colour() -> None:
    squared = square(np.asarray(Image.new("RGB", (64, 32), "red")), RULE, "pad")
    assert squared.shape == (32, 32, 3)
    assert tuple(squared[0, 16]) == mean_colour(RULE) == (127, 102, 76)
    assert tuple(squared[16, 0]) == tuple(squared[16, 31]) == (255, 0, 0)


def test_cropping_keeps_the_centre_of_the_longer_side() -> None:
    image = Image.new("RGB", (96, 32), "blue")
    image.paste("red", (32, 0, 64, 32))
    squared = square(np.asarray(image), RULE, "crop")
    assert squared.shape == (32, 32, 3)
    assert tuple(squared[16, 16]) == (255, 0, 0)


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("size", [(640, 480), (33, 127), (32, 32), (20, 11)])
def test_the_fast_resize_is_within_one_level_of_pillows(fit: str, size: tuple[int, int]) -> None:
    image = photo(*size)
    fast, exact = (resize(np.asarray(image), RULE, fit).astype(int) for resize in (square_fast, square))
    assert fast.shape == exact.shape == (32, 32, 3)
    assert np.abs(fast - exact).max() <= 1


@pytest.mark.parametrize("storing", [ImageEncoding(format="png"), ImageEncoding(format="webp")])
def test_lossless_storage_returns_the_same_pixels(storing: ImageEncoding) -> None:
    image = photo(90, 50)
    stored = prepare_image(encoded(image), RULE, "pad", storing, LIMIT)
    assert np.array_equal(decode_stored(stored), square(np.asarray(image), RULE, "pad"))


def test_the_default_storage_stays_close_to_the_pixels() -> None:
    image = photo(640, 480)
    rule = PixelRule(336, RULE.mean, RULE.std)
    stored = prepare_image(encoded(image), rule, "pad", ImageEncoding(), LIMIT)
    difference = np.abs(decode_stored(stored).astype(int) - square(np.asarray(image), rule, "pad").astype(int))
    assert difference.mean() < 2.0  # of 255, on hard noise


def test_normalised_pixels_are_channels_first_by_mean_and_std() -> None:
    pixels = normalise(blank_pixels(RULE)[None], RULE)
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels.dtype == np.float32
    assert np.abs(pixels).max() < 0.02  # the mean colour is zero, to the rounding of 8 bits
