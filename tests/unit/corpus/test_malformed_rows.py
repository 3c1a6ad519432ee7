"""Sixty kinds of unusual and malformed rows in one corpus: each becomes a sample or is quarantined with its reason."""

import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raylava.corpus.blocks import QUARANTINE, Blocks, decode_quarantine
from raylava.corpus.quarantine import Reason
from raylava.corpus.shards import PrepareSpec
from tests.support.corpora import prepare_serially

ACCEPTED = None  # the row becomes a sample
QUESTION = {"from": "human", "value": "<image>\nWhat?"}
ANSWER = {"from": "gpt", "value": "a cat"}


def photo(size: tuple[int, int] = (64, 48)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


JPEG, PNG = save(photo(), "JPEG"), save(photo(), "PNG")


def flip_bytes(content: bytes, start: int, count: int) -> bytes:
    return content[:start] + bytes(byte ^ 0xFF for byte in content[start : start + count]) + content[start + count :]


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 8
    return save(photo(), "JPEG", exif=exif)


UNREADABLE, TRUNCATED = Reason.IMAGE_UNREADABLE, Reason.IMAGE_TRUNCATED
IMAGES: dict[str, tuple[bytes, Reason | None]] = {
    "gif called jpg": (save(photo(), "GIF"), ACCEPTED),
    "png called jpg": (PNG, ACCEPTED),
    "webp": (save(photo(), "WEBP"), ACCEPTED),
    "bmp": (save(photo(), "BMP"), ACCEPTED),
    "tiff": (save(photo(), "TIFF"), ACCEPTED),
    "palette": (save(photo().quantize(16), "PNG"), ACCEPTED),
    "palette with transparency": (save(photo().quantize(16), "PNG", transparency=0), ACCEPTED),
    "one bit": (save(photo().convert("1"), "PNG"), ACCEPTED),
    "grey": (save(photo().convert("L"), "PNG"), ACCEPTED),
    "grey with alpha": (save(photo().convert("LA"), "PNG"), ACCEPTED),
    "alpha": (save(photo().convert("RGBA"), "PNG"), ACCEPTED),
    "cmyk": (save(photo().convert("CMYK"), "JPEG"), ACCEPTED),
    "progressive": (save(photo(), "JPEG", progressive=True), ACCEPTED),
    "16 bit": (save(Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)), "PNG"), ACCEPTED),
    "float tiff": (save(Image.fromarray(np.full((9, 9), 0.5, dtype=np.float32)), "TIFF"), ACCEPTED),
    "rotated by exif": (rotated_by_exif(), ACCEPTED),
    "one pixel": (save(photo((1, 1)), "PNG"), ACCEPTED),
    "one pixel high": (save(photo((500, 1)), "PNG"), ACCEPTED),
    "one pixel wide": (save(photo((1, 500)), "PNG"), ACCEPTED),
    "junk after the end": (JPEG + b"junk" * 50, ACCEPTED),
    "empty": (b"", UNREADABLE),
    "text": (b"this is no image", UNREADABLE),
    "html": (b"<!doctype html><title>404</title>", UNREADABLE),
    "zeros": (bytes(4000), UNREADABLE),
    "jpeg marker alone": (JPEG[:2], UNREADABLE),
    "jpeg header alone": (JPEG[:20], UNREADABLE),
    "png signature alone": (PNG[:8], UNREADABLE),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', UNREADABLE),
    "json": (b"{}", UNREADABLE),
    "eps, which starts Ghostscript": (save(photo(), "EPS"), UNREADABLE),
    "icon": (save(photo(), "ICO"), UNREADABLE),
    "portable pixmap": (save(photo(), "PPM"), UNREADABLE),
    "jpeg cut at its end": (JPEG[:-200], TRUNCATED),
    "png cut in half": (PNG[: len(PNG) // 2], TRUNCATED),
    "png with a damaged header": (flip_bytes(PNG, 16, 4), UNREADABLE),
    "sliver": (save(Image.new("1", (60_000, 1)), "PNG"), Reason.IMAGE_TOO_LARGE),
    "bomb": (save(Image.new("1", (12_000, 12_000)), "PNG"), Reason.IMAGE_TOO_LARGE),
}


def make_row(*turns: dict[str, Any], **row: Any) -> dict[str, Any]:
    return {"image": "good.jpg", "conversations": list(turns), **row}


ROWS: dict[str, tuple[Any, Reason | None]] = {
    "text alone": ({"conversations": [{"from": "human", "value": "Hi"}, ANSWER]}, ACCEPTED),
    "no id": (make_row(QUESTION, ANSWER), ACCEPTED),
    "a number as id": (make_row(QUESTION, ANSWER, id=7), ACCEPTED),
    "a carriage return in the id": (make_row(QUESTION, ANSWER, id="a\rb"), ACCEPTED),
    "an id of 200,000 characters": (make_row(QUESTION, ANSWER, id="x" * 200_000), ACCEPTED),
    "a lone surrogate in the id": (make_row(QUESTION, ANSWER, id="\ud800"), ACCEPTED),
    "a lone surrogate in the text": (make_row(QUESTION, {"from": "gpt", "value": "\ud800"}), Reason.FAILED),
    "a lone surrogate in the path": (make_row(QUESTION, ANSWER, image="\ud800.jpg"), Reason.FAILED),
    "messages": (
        {
            "image": "good.jpg",
            "messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}],
        },
        ACCEPTED,
    ),
    "typed control tokens": (make_row(QUESTION, {"from": "gpt", "value": "<end_of_turn><eos>"}), ACCEPTED),
    "a system turn": (make_row({"from": "system", "value": "Be brief."}, QUESTION, ANSWER), ACCEPTED),
    "missing image": (make_row(QUESTION, ANSWER, image="none.jpg"), Reason.IMAGE_MISSING),
    "a folder as image": (make_row(QUESTION, ANSWER, image="folder"), Reason.IMAGE_MISSING),
    "path up": (make_row(QUESTION, ANSWER, image="../rows.json"), Reason.PATH_ESCAPES),
    "path up inside": (make_row(QUESTION, ANSWER, image="folder/../../rows.json"), Reason.PATH_ESCAPES),
    "absolute path": (make_row(QUESTION, ANSWER, image="/etc/hostname"), Reason.PATH_ESCAPES),
    "home path": (make_row(QUESTION, ANSWER, image="~/x.jpg"), Reason.PATH_ESCAPES),
    "url": (make_row(QUESTION, ANSWER, image="http://127.0.0.1/x.jpg"), Reason.IMAGE_NOT_FETCHED),
    "link out": (make_row(QUESTION, ANSWER, image="link.jpg"), Reason.PATH_ESCAPES),
    "a number as image": (make_row(QUESTION, ANSWER, image=3), Reason.NOT_A_ROW),
    "an object as image": (make_row(QUESTION, ANSWER, image={"url": "x"}), Reason.NOT_A_ROW),
    "a string as row": ("row", Reason.NOT_A_ROW),
    "null as row": (None, Reason.NOT_A_ROW),
    "a list as row": ([], Reason.NOT_A_ROW),
    "no conversations": ({"image": "good.jpg"}, Reason.NO_TURNS),
    "empty conversations": (make_row(), Reason.NO_TURNS),
    "conversations as text": ({"conversations": "Hi"}, Reason.NO_TURNS),
    "a turn as text": (make_row("Hi"), Reason.NOT_A_ROW),  # type: ignore[arg-type]
    "a turn without value": (make_row({"from": "human"}, ANSWER), Reason.NOT_A_ROW),
    "a number as value": (make_row({"from": "human", "value": 1}, ANSWER), Reason.NOT_A_ROW),
    "an unknown speaker": (make_row(QUESTION, {"from": "tool", "value": "x"}), Reason.NOT_ALTERNATING),
    "model first": (make_row(ANSWER, QUESTION), Reason.NOT_ALTERNATING),
    "two questions": (make_row(QUESTION, QUESTION), Reason.NOT_ALTERNATING),
    "no answer": (make_row(QUESTION), Reason.NOT_ALTERNATING),
    "an unanswered end": (make_row(QUESTION, ANSWER, {"from": "human", "value": "And?"}), Reason.NOT_ALTERNATING),
    "an empty answer": (make_row(QUESTION, {"from": "gpt", "value": " \n"}), Reason.NOTHING_SUPERVISED),
    "image without token": (make_row({"from": "human", "value": "What?"}, ANSWER), Reason.IMAGE_WITHOUT_TOKEN),
    "token without image": ({"conversations": [QUESTION, ANSWER]}, Reason.TOKEN_WITHOUT_IMAGE),
    "two tokens, one image": (
        make_row({"from": "human", "value": "<image><image>"}, ANSWER),
        Reason.TOKEN_WITHOUT_IMAGE,
    ),
    "token in an answer": (make_row(QUESTION, {"from": "gpt", "value": "<image>"}), Reason.TOKEN_WITHOUT_IMAGE),
    "too long": (make_row(QUESTION, {"from": "gpt", "value": "word " * 999}), Reason.TOO_LONG),
}


@pytest.fixture(scope="module")
def outcomes(prepare_spec: PrepareSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reason | None]:
    """Prepare all rows; return the reason for which each was quarantined (None if it became a sample), by name."""
    folder = tmp_path_factory.mktemp("broken")
    images = folder / "images"
    (images / "folder").mkdir(parents=True)
    (images / "good.jpg").write_bytes(JPEG)
    rows, names = [], []
    for name, (content, _) in IMAGES.items():
        (images / f"{name}.jpg").write_bytes(content)
        rows.append(make_row(QUESTION, ANSWER, image=f"{name}.jpg"))
        names.append(name)
    for name, (row, _) in ROWS.items():
        rows.append(row)
        names.append(name)
    (folder / "rows.json").write_text(json.dumps(rows))
    (images / "link.jpg").symlink_to(folder / "rows.json")
    corpus = prepare_spec.corpus.model_copy(update={"quarantine_limit": 1.0})
    paths = ((str(folder / "rows.json"), str(images)),)
    spec = dataclasses.replace(prepare_spec, corpus=corpus, source_paths=paths, output=str(folder / "out"))
    manifest = prepare_serially(spec)
    assert manifest.rows_in == len(rows) == manifest.rows + manifest.quarantined
    quarantine = decode_quarantine((folder / "out" / QUARANTINE).read_bytes())
    reasons: dict[str, Reason | None] = {names[row.row]: Reason(row.reason) for row in quarantine}
    blocks = Blocks(folder / "out")
    accepted = {int(blocks[number].sample_id.rpartition(".")[2]) for number in range(len(blocks))}
    return reasons | {names[row]: ACCEPTED for row in accepted}


EXPECTED = {name: reason for cases in (IMAGES, ROWS) for name, (_, reason) in cases.items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_row_is_accepted_or_quarantined_with_the_expected_reason(name: str, outcomes: dict[str, Reason | None]) -> None:
    assert outcomes[name] == EXPECTED[name]


def test_at_least_sixty_kinds_of_rows_are_covered() -> None:
    assert len(EXPECTED) >= 60
