"""Selection and parsing of source rows; unreadable files raise UserError, malformed rows BadRow."""

import json
from pathlib import Path
from typing import Any

import pytest

from raylava.config.recipe import Source
from raylava.corpus.conversation import Turn
from raylava.corpus.quarantine import BadRow, Reason
from raylava.corpus.row_index import RowIndexes
from raylava.corpus.rows import image_names, parse_row, resolve_image_path
from raylava.corpus.sources import SourceFiles
from raylava.errors import UserError
from raylava.storage import storage_path

CONVERSATION = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
TURNS = (Turn("human", "<image>\nWhat?"), Turn("gpt", "A cat."))


def make_source(folder: Path, rows: Any, **settings: Any) -> SourceFiles:
    file = folder / "rows.json"
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return SourceFiles(Source(annotations="rows.json", **settings), str(file), str(folder))


def test_row_has_id_images_and_turns() -> None:
    row = parse_row({"id": "x", "image": "a.png", "conversations": CONVERSATION}, "#7")
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
def test_a_row_may_have_no_image_one_or_many_as_paths_or_bytes(image: Any, images: tuple[str | bytes, ...]) -> None:
    assert parse_row({"image": image, "conversations": CONVERSATION}, "").images == images


def test_messages_with_role_and_content_are_parsed_as_turns() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    assert parse_row({"messages": messages}, "").turns == TURNS


def test_system_text_is_prepended_to_the_first_question() -> None:
    turns = parse_row({"conversations": [{"from": "system", "value": "Be brief.\n"}, *CONVERSATION]}, "").turns
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
        ({"image": 3, "conversations": CONVERSATION}, Reason.NOT_A_ROW),
        ({"image": {"bytes": None, "path": None}, "conversations": CONVERSATION}, Reason.NOT_A_ROW),
    ],
)
def test_malformed_row_raises_bad_row_with_its_reason(raw: Any, reason: Reason) -> None:
    with pytest.raises(BadRow) as bad:
        parse_row(raw, "")
    assert bad.value.reason == reason


def selected_numbers(source: SourceFiles) -> list[int]:
    return [row.row for row in source.selected_rows(0, RowIndexes())]


def test_filters_select_rows_by_image_path_and_keep_row_numbers(tmp_path: Path) -> None:
    rows: list[Any] = [{"image": f"{number % 3}/x.png", "conversations": CONVERSATION} for number in range(6)]
    rows += [{"image": None, "conversations": CONVERSATION}, "broken"]
    assert selected_numbers(make_source(tmp_path, rows, exclude=("0/*",))) == [1, 2, 4, 5, 6, 7]
    assert selected_numbers(make_source(tmp_path, rows, include=("0/*",), max_rows=1)) == [0]


@pytest.mark.parametrize(("weight", "least", "most"), [(0.25, 70, 130), (1.0, 400, 400), (2.5, 960, 1040)])
def test_sampling_weight_keeps_a_fraction_of_rows_or_repeats_them(
    tmp_path: Path, weight: float, least: int, most: int
) -> None:
    source = make_source(tmp_path, [{"conversations": CONVERSATION}] * 400, sampling_weight=weight)
    rows = list(source.selected_rows(0, RowIndexes()))
    assert least <= len(rows) <= most
    assert rows == list(source.selected_rows(0, RowIndexes())), "selection is deterministic"
    assert len({row.id_suffix for row in rows}) == len(rows), "ids stay unique"


def test_folder_of_files_is_one_source_in_name_order(tmp_path: Path) -> None:
    for name, count in (("b.json", 2), ("a.jsonl", 3)):
        rows = [{"conversations": CONVERSATION}] * count
        text = json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_text(text)
    (tmp_path / "notes.md").write_text("not rows")
    source = SourceFiles(Source(annotations="."), str(tmp_path), str(tmp_path))
    assert [(row.file, row.row) for row in source.selected_rows(0, RowIndexes())] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.json", "no such file"), ("rows.xml", "does not indicate its format"), (".", "no file of a known")],
)
def test_unreadable_annotations_raise_user_error(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "rows.xml").write_text("<rows/>")
    with pytest.raises(UserError, match=message):
        list(SourceFiles(Source(annotations=name), str(tmp_path / name), "").selected_rows(0, RowIndexes()))


@pytest.mark.parametrize(
    "name", ["../secret.png", "a/../../b.png", "/etc/passwd", "~/x.png", "s3://b/x.png", "a\\..\\..\\b", "a\0b"]
)
def test_image_path_cannot_escape_its_root(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadRow) as bad:
        resolve_image_path(storage_path(tmp_path), name)
    assert bad.value.reason == Reason.PATH_ESCAPES


def test_image_path_is_normalized_below_its_root(tmp_path: Path) -> None:
    assert resolve_image_path(storage_path(tmp_path), "./a//b.png").path == str(tmp_path / "a" / "b.png")
    assert image_names({"image": ["a", b"b"]}) == ("a",)


def test_compressed_file_in_a_folder_of_annotations_is_not_left_out_in_silence(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "b.jsonl.gz").write_text("")
    with pytest.raises(UserError, match=r"b\.jsonl\.gz: compressed, so that its rows cannot be read; decompress it"):
        SourceFiles(Source(annotations="."), str(tmp_path), "").files  # noqa: B018
