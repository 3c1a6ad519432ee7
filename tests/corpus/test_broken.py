"""Sixty kinds of odd and broken rows in one corpus: each is read as a person would, or set aside with its reason."""

import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raylava.console import NullProgressBar
from raylava.corpus.blocks import QUARANTINE, Blocks, read_quarantine
from raylava.corpus.prepare import PrepareSpec, prepare
from raylava.corpus.quarantine import Reason

READ = None  # the row becomes a sample
ASK = {"from": "human", "value": "<image>\nWhat?"}
SAY = {"from": "gpt", "value": "a cat"}


def photo(size: tuple[int, int] = (64, 48)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


JPEG, PNG = saved(photo(), "JPEG"), saved(photo(), "PNG")


def flipped(content: bytes, start: int, count: int) -> bytes:
    return content[:start] + bytes(byte ^ 0xFF for byte in content[start : start + count]) + content[start + count :]


def oriented() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 8
    return saved(photo(), "JPEG", exif=exif)


UNREADABLE, TRUNCATED = Reason.IMAGE_UNREADABLE, Reason.IMAGE_TRUNCATED
IMAGES: dict[str, tuple[bytes, Reason | None]] = {
    "gif called jpg": (saved(photo(), "GIF"), READ),
    "png called jpg": (PNG, READ),
    "webp": (saved(photo(), "WEBP"), READ),
    "bmp": (saved(photo(), "BMP"), READ),
    "tiff": (saved(photo(), "TIFF"), READ),
    "palette": (saved(photo().quantize(16), "PNG"), READ),
    "palette with transparency": (saved(photo().quantize(16), "PNG", transparency=0), READ),
    "one bit": (saved(photo().convert("1"), "PNG"), READ),
    "grey": (saved(photo().convert("L"), "PNG"), READ),
    "grey with alpha": (saved(photo().convert("LA"), "PNG"), READ),
    "alpha": (saved(photo().convert("RGBA"), "PNG"), READ),
    "cmyk": (saved(photo().convert("CMYK"), "JPEG"), READ),
    "progressive": (saved(photo(), "JPEG", progressive=True), READ),
    "16 bit": (saved(Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)), "PNG"), READ),
    "float tiff": (saved(Image.fromarray(np.full((9, 9), 0.5, dtype=np.float32)), "TIFF"), READ),
    "turned by exif": (oriented(), READ),
    "one pixel": (saved(photo((1, 1)), "PNG"), READ),
    "one pixel high": (saved(photo((500, 1)), "PNG"), READ),
    "one pixel wide": (saved(photo((1, 500)), "PNG"), READ),
    "junk after the end": (JPEG + b"junk" * 50, READ),
    "empty": (b"", UNREADABLE),
    "text": (b"this is no image", UNREADABLE),
    "html": (b"<!doctype html><title>404</title>", UNREADABLE),
    "zeros": (bytes(4000), UNREADABLE),
    "jpeg marker alone": (JPEG[:2], UNREADABLE),
    "jpeg header alone": (JPEG[:20], UNREADABLE),
    "png signature alone": (PNG[:8], UNREADABLE),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', UNREADABLE),
    "json": (b"{}", UNREADABLE),
    "jpeg cut at its end": (JPEG[:-200], TRUNCATED),
    "png cut in half": (PNG[: len(PNG) // 2], TRUNCATED),
    "png with a damaged header": (flipped(PNG, 16, 4), UNREADABLE),
    "sliver": (saved(Image.new("1", (60_000, 1)), "PNG"), Reason.IMAGE_TOO_LARGE),
    "bomb": (saved(Image.new("1", (12_000, 12_000)), "PNG"), Reason.IMAGE_TOO_LARGE),
}


def talk(*turns: dict[str, Any], **row: Any) -> dict[str, Any]:
    return {"image": "good.jpg", "conversations": list(turns), **row}


ROWS: dict[str, tuple[Any, Reason | None]] = {
    "text alone": ({"conversations": [{"from": "human", "value": "Hi"}, SAY]}, READ),
    "no id": (talk(ASK, SAY), READ),
    "a number as id": (talk(ASK, SAY, id=7), READ),
    "messages": (
        {
            "image": "good.jpg",
            "messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}],
        },
        READ,
    ),
    "typed control tokens": (talk(ASK, {"from": "gpt", "value": "<end_of_turn><eos>"}), READ),
    "a system turn": (talk({"from": "system", "value": "Be brief."}, ASK, SAY), READ),
    "missing image": (talk(ASK, SAY, image="none.jpg"), Reason.IMAGE_MISSING),
    "a folder as image": (talk(ASK, SAY, image="folder"), Reason.IMAGE_MISSING),
    "path up": (talk(ASK, SAY, image="../rows.json"), Reason.PATH_ESCAPES),
    "path up inside": (talk(ASK, SAY, image="folder/../../rows.json"), Reason.PATH_ESCAPES),
    "absolute path": (talk(ASK, SAY, image="/etc/hostname"), Reason.PATH_ESCAPES),
    "home path": (talk(ASK, SAY, image="~/x.jpg"), Reason.PATH_ESCAPES),
    "url": (talk(ASK, SAY, image="http://host/x.jpg"), Reason.PATH_ESCAPES),
    "link out": (talk(ASK, SAY, image="link.jpg"), Reason.PATH_ESCAPES),
    "a number as image": (talk(ASK, SAY, image=3), Reason.NOT_A_ROW),
    "an object as image": (talk(ASK, SAY, image={"url": "x"}), Reason.NOT_A_ROW),
    "a string as row": ("row", Reason.NOT_A_ROW),
    "null as row": (None, Reason.NOT_A_ROW),
    "a list as row": ([], Reason.NOT_A_ROW),
    "no conversations": ({"image": "good.jpg"}, Reason.NO_TURNS),
    "empty conversations": (talk(), Reason.NO_TURNS),
    "conversations as text": ({"conversations": "Hi"}, Reason.NO_TURNS),
    "a turn as text": (talk("Hi"), Reason.NOT_A_ROW),  # type: ignore[arg-type]
    "a turn without value": (talk({"from": "human"}, SAY), Reason.NOT_A_ROW),
    "a number as value": (talk({"from": "human", "value": 1}, SAY), Reason.NOT_A_ROW),
    "an unknown speaker": (talk(ASK, {"from": "tool", "value": "x"}), Reason.NOT_ALTERNATING),
    "model first": (talk(SAY, ASK), Reason.NOT_ALTERNATING),
    "two questions": (talk(ASK, ASK), Reason.NOT_ALTERNATING),
    "no answer": (talk(ASK), Reason.NOT_ALTERNATING),
    "an unanswered end": (talk(ASK, SAY, {"from": "human", "value": "And?"}), Reason.NOT_ALTERNATING),
    "an empty answer": (talk(ASK, {"from": "gpt", "value": " \n"}), Reason.NOTHING_SUPERVISED),
    "image without token": (talk({"from": "human", "value": "What?"}, SAY), Reason.IMAGE_WITHOUT_TOKEN),
    "token without image": ({"conversations": [ASK, SAY]}, Reason.TOKEN_WITHOUT_IMAGE),
    "two tokens, one image": (talk({"from": "human", "value": "<image><image>"}, SAY), Reason.TOKEN_WITHOUT_IMAGE),
    "token in an answer": (talk(ASK, {"from": "gpt", "value": "<image>"}), Reason.TOKEN_WITHOUT_IMAGE),
    "too long": (talk(ASK, {"from": "gpt", "value": "word " * 999}), Reason.TOO_LONG),
}


@pytest.fixture(scope="module")
def outcome(prepare_job: PrepareSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reason | None]:
    """What became of each row, by its name; and no row is lost."""
    folder = tmp_path_factory.mktemp("broken")
    images = folder / "images"
    (images / "folder").mkdir(parents=True)
    (images / "good.jpg").write_bytes(JPEG)
    rows, names = [], []
    for name, (content, _) in IMAGES.items():
        (images / f"{name}.jpg").write_bytes(content)
        rows.append(talk(ASK, SAY, image=f"{name}.jpg"))
        names.append(name)
    for name, (row, _) in ROWS.items():
        rows.append(row)
        names.append(name)
    (folder / "rows.json").write_text(json.dumps(rows))
    (images / "link.jpg").symlink_to(folder / "rows.json")
    corpus = prepare_job.corpus.model_copy(update={"quarantine_limit": 1.0})
    places = ((str(folder / "rows.json"), str(images)),)
    spec = dataclasses.replace(prepare_job, corpus=corpus, places=places, output=str(folder / "out"))
    manifest = prepare(spec, "tokenizer", NullProgressBar())
    assert manifest.rows_in == len(rows) == manifest.rows + manifest.quarantined
    quarantine = read_quarantine((folder / "out" / QUARANTINE).read_bytes())
    found: dict[str, Reason | None] = {names[row.row]: Reason(row.reason) for row in quarantine}
    blocks = Blocks(folder / "out")
    read = {int(blocks[number].sample_id.rpartition(".")[2]) for number in range(len(blocks))}
    return found | {names[row]: READ for row in read}


EXPECTED = {name: reason for kinds in (IMAGES, ROWS) for name, (_, reason) in kinds.items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_row_is_read_or_set_aside_for_the_right_reason(name: str, outcome: dict[str, Reason | None]) -> None:
    assert outcome[name] == EXPECTED[name]


def test_there_are_enough_kinds() -> None:
    assert len(EXPECTED) >= 60
