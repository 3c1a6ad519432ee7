"""LLaVA JSON is read as people write it; another file is the user's mistake, a bad row is set aside."""

import json
from pathlib import Path
from typing import Any

import pytest

from raylava.corpus.conversation import Turn
from raylava.corpus.quarantine import BadRow, Reason
from raylava.corpus.sources import Selection, image_place, parse_row, read_raw_rows, referenced_images
from raylava.errors import UserError
from raylava.storage import Place, place

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]


def write(folder: Path, rows: Any) -> Place:
    file = folder / "rows.json"
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return place(file)


def test_a_row_has_its_id_pictures_and_turns() -> None:
    row = parse_row(7, {"id": "x", "image": "a.png", "conversations": TALK})
    assert row.sample_id == "x#7"
    assert row.images == ("a.png",)
    assert row.turns == (Turn("human", "<image>\nWhat?"), Turn("gpt", "A cat."))


@pytest.mark.parametrize("raw", [{"conversations": TALK}, {"image": None, "conversations": TALK}])
def test_a_row_without_image_is_text_alone(raw: dict[str, Any]) -> None:
    assert parse_row(0, raw).images == ()


def test_a_row_may_have_several_pictures() -> None:
    assert parse_row(0, {"image": ["a.png", "b.png"], "conversations": TALK}).images == ("a.png", "b.png")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("text", Reason.NOT_A_ROW),
        ({"conversations": []}, Reason.NO_TURNS),
        ({"image": "a.png"}, Reason.NO_TURNS),
        ({"conversations": [{"from": "human"}]}, Reason.NOT_A_ROW),
        ({"conversations": [{"from": "human", "value": 3}]}, Reason.NOT_A_ROW),
        ({"conversations": [{"from": "system", "value": "x"}]}, Reason.NOT_ALTERNATING),
    ],
)
def test_a_bad_row_says_why(raw: Any, reason: Reason) -> None:
    with pytest.raises(BadRow) as bad:
        parse_row(0, raw)
    assert bad.value.reason == reason


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{not json", "not JSON"),
        ({"a": 1}, "non-empty list"),
        ([], "non-empty list"),
        ([{"text": "x"}], "no row has `conversations`"),
    ],
)
def test_a_file_that_is_not_llava_json_is_the_users_mistake(tmp_path: Path, content: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        list(read_raw_rows(write(tmp_path, content), Selection()))


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        list(read_raw_rows(place(tmp_path / "none.json"), Selection()))


def test_rows_are_selected_by_image_path_and_keep_their_numbers(tmp_path: Path) -> None:
    rows = [{"image": f"{number % 3}/x.png", "conversations": TALK} for number in range(6)]
    rows.append({"image": None, "conversations": TALK})
    file = write(tmp_path, rows)
    assert [number for number, _ in read_raw_rows(file, Selection(exclude=("0/*",)))] == [1, 2, 4, 5, 6]
    assert [number for number, _ in read_raw_rows(file, Selection(include=("0/*",), limit=1))] == [0]
    assert referenced_images(file, Selection(include=("0/*", "1/*"))) == {"0/x.png", "1/x.png"}


@pytest.mark.parametrize(
    "name", ["../secret.png", "a/../../b.png", "/etc/passwd", "~/x.png", "s3://b/x.png", "a\\..\\..\\b", "a\0b"]
)
def test_an_image_path_cannot_leave_its_root(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadRow) as bad:
        image_place(place(tmp_path), name)
    assert bad.value.reason == Reason.PATH_ESCAPES


def test_an_image_path_lies_below_its_root(tmp_path: Path) -> None:
    assert image_place(place(tmp_path), "./a//b.png").path == str(tmp_path / "a" / "b.png")
