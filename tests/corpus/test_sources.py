"""Rows are read as people write them; another file is the user's mistake, a bad row is set aside."""

import json
from pathlib import Path
from typing import Any

import pytest

from raylava.config.recipe import Source
from raylava.corpus.conversation import Turn
from raylava.corpus.quarantine import BadRow, Reason
from raylava.corpus.sources import SourceFiles, image_names, image_place, parse_row
from raylava.errors import UserError
from raylava.storage import storage_path

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
TURNS = (Turn("human", "<image>\nWhat?"), Turn("gpt", "A cat."))


def source_of(folder: Path, rows: Any, **settings: Any) -> SourceFiles:
    file = folder / "rows.json"
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return SourceFiles(Source(annotations="rows.json", **settings), str(file), str(folder))


def test_a_row_has_its_id_images_and_turns() -> None:
    row = parse_row({"id": "x", "image": "a.png", "conversations": TALK}, "#7")
    assert (row.sample_id, row.images, row.turns) == ("x#7", ("a.png",), TURNS)


@pytest.mark.parametrize(
    ("image", "images"),
    [
        (None, ()),
        ("", ()),
        (["a.png", "b.png"], ("a.png", "b.png")),
        (b"bytes", (b"bytes",)),
        ({"bytes": b"bytes", "path": "a.png"}, (b"bytes",)),
        ({"bytes": None, "path": "a.png"}, ("a.png",)),
        ([{"bytes": b"1", "path": None}, "b.png"], (b"1", "b.png")),
    ],
)
def test_images_are_paths_or_bytes_one_or_many_or_none(image: Any, images: tuple[str | bytes, ...]) -> None:
    assert parse_row({"image": image, "conversations": TALK}, "").images == images


def test_messages_of_role_and_content_are_turns() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    assert parse_row({"messages": messages}, "").turns == TURNS


def test_a_system_text_goes_before_the_first_question() -> None:
    turns = parse_row({"conversations": [{"from": "system", "value": "Be brief.\n"}, *TALK]}, "").turns
    assert turns == (Turn("human", "Be brief.\n\n<image>\nWhat?"), Turn("gpt", "A cat."))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("text", Reason.NOT_A_ROW),
        (7, Reason.NOT_A_ROW),
        ({"conversations": []}, Reason.NO_TURNS),
        ({"image": "a.png"}, Reason.NO_TURNS),
        ({"conversations": "Hi"}, Reason.NO_TURNS),
        ({"conversations": ["Hi"]}, Reason.NOT_A_ROW),
        ({"conversations": [{"from": "human"}]}, Reason.NOT_A_ROW),
        ({"conversations": [{"from": "human", "value": 3}]}, Reason.NOT_A_ROW),
        ({"conversations": [{"from": "tool", "value": "x"}]}, Reason.NOT_ALTERNATING),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, Reason.NOT_ALTERNATING),
        ({"image": 3, "conversations": TALK}, Reason.NOT_A_ROW),
        ({"image": {"bytes": None, "path": None}, "conversations": TALK}, Reason.NOT_A_ROW),
    ],
)
def test_a_bad_row_says_why(raw: Any, reason: Reason) -> None:
    with pytest.raises(BadRow) as bad:
        parse_row(raw, "")
    assert bad.value.reason == reason


def rows_of(source: SourceFiles) -> list[int]:
    return [pick.row for pick in source.picks(0)]


def test_rows_are_chosen_by_image_path_and_keep_their_numbers(tmp_path: Path) -> None:
    rows: list[Any] = [{"image": f"{number % 3}/x.png", "conversations": TALK} for number in range(6)]
    rows += [{"image": None, "conversations": TALK}, "broken"]
    assert rows_of(source_of(tmp_path, rows, exclude=("0/*",))) == [1, 2, 4, 5, 6, 7]
    assert rows_of(source_of(tmp_path, rows, include=("0/*",), max_rows=1)) == [0]


@pytest.mark.parametrize(("weight", "least", "most"), [(0.25, 70, 130), (1.0, 400, 400), (2.5, 960, 1040)])
def test_a_weight_takes_a_share_of_rows_or_repeats_them(tmp_path: Path, weight: float, least: int, most: int) -> None:
    source = source_of(tmp_path, [{"conversations": TALK}] * 400, sampling_weight=weight)
    picks = list(source.picks(0))
    assert least <= len(picks) <= most
    assert picks == list(source.picks(0)), "the same rows each time"
    assert len({pick.suffix for pick in picks}) == len(picks), "ids stay unique"


def test_a_folder_of_files_is_one_source_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, count in (("b.json", 2), ("a.jsonl", 3)):
        rows = [{"conversations": TALK}] * count
        text = json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_text(text)
    (tmp_path / "notes.md").write_text("not rows")
    source = SourceFiles(Source(annotations="."), str(tmp_path), str(tmp_path))
    assert [(pick.file, pick.row) for pick in source.picks(0)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_a_source_is_identified_by_content_not_by_place(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "conversations": TALK}]
    found = []
    for name, image in (("one", b"123"), ("two", b"123"), ("three", b"1234")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.png").write_bytes(image)
        (folder / "not named by any row.png").write_bytes(name.encode())
        found.append(source_of(folder, rows).identity())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("name", "told"),
    [("none.json", "no such file"), ("rows.xml", "cannot tell its format"), (".", "no file of a known")],
)
def test_annotations_that_cannot_be_read_are_the_users_mistake(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "rows.xml").write_text("<rows/>")
    with pytest.raises(UserError, match=told):
        list(SourceFiles(Source(annotations=name), str(tmp_path / name), "").picks(0))


def test_a_missing_image_folder_is_the_users_mistake(tmp_path: Path) -> None:
    source = source_of(tmp_path, [{"image": "a.png", "conversations": TALK}])
    with pytest.raises(UserError, match="no such image folder"):
        SourceFiles(source.source, source.annotations, str(tmp_path / "none")).identity()


@pytest.mark.parametrize(
    "name", ["../secret.png", "a/../../b.png", "/etc/passwd", "~/x.png", "s3://b/x.png", "a\\..\\..\\b", "a\0b"]
)
def test_an_image_path_cannot_leave_its_root(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadRow) as bad:
        image_place(storage_path(tmp_path), name)
    assert bad.value.reason == Reason.PATH_ESCAPES


def test_an_image_path_lies_below_its_root(tmp_path: Path) -> None:
    assert image_place(storage_path(tmp_path), "./a//b.png").path == str(tmp_path / "a" / "b.png")
    assert image_names({"image": ["a", b"b"]}) == ("a",)
