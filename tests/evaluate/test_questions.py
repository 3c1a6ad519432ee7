"""Question files as people have them: JSONL, or LLaVA JSON where each human turn is asked on its own."""

import json
from pathlib import Path

import pytest

from raylava.config.recipe import Benchmark
from raylava.errors import UserError
from raylava.evaluate.questions import Question, identity, read_questions
from raylava.storage import storage_path

BENCHMARK = Benchmark(name="b", questions="q", categories={"count": "^How many", "truth": "true"})


def test_jsonl_questions(tmp_path: Path) -> None:
    lines = [
        {"question_id": 1, "image": "a.png", "text": "How many?", "answer": "two"},
        {"question_id": "x", "text": "Hello", "category": "talk", "answer": "Hi"},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert read_questions(storage_path(tmp_path / "q.jsonl"), BENCHMARK) == [
        Question("1", "a.png", "How many?", "count", ("two",)),
        Question("x", None, "Hello", "talk", ("Hi",)),
    ]


def test_each_human_turn_of_llava_json_is_asked_with_what_came_before(tmp_path: Path) -> None:
    talk = [
        {"from": "human", "value": "<image>\nIs it true?"},
        {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "How many cats?"},
        {"from": "gpt", "value": "2"},
    ]
    rows = [{"id": "r", "image": f"{split}/a.png", "conversations": talk} for split in "05"]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    held_out = BENCHMARK.model_copy(update={"include": ("5/*",)})
    assert read_questions(storage_path(tmp_path / "q.json"), held_out) == [
        Question("r#1-0", "5/a.png", "Is it true?", "truth", ("yes",)),
        Question("r#1-1", "5/a.png", "How many cats?", "count", ("2",), (("Is it true?", "yes"),)),
    ]
    assert len(read_questions(storage_path(tmp_path / "q.json"), BENCHMARK.model_copy(update={"max_rows": 3}))) == 3


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("q.jsonl", '{"question_id": 1, "text": "a"}', "q.jsonl:1: not a question"),
        ("q.jsonl", "nonsense", "q.jsonl:1: not a question"),
        ("q.jsonl", "", "holds no question"),
        ("q.json", '[{"conversations": []}]', "row 0 cannot be asked"),
        ("q.jsonl", '{"question_id": 1, "text": "a", "answer": "b"}\n' * 2, "two questions are called '1'"),
        ("q.jsonl", '{"question_id": 1, "text": "a", "answers": []}', "question '1' has no answer"),
    ],
)
def test_a_file_that_cannot_be_asked_is_told_in_one_line(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=told):
        read_questions(storage_path(tmp_path / name), BENCHMARK)


def test_a_missing_file_is_told_by_its_benchmark(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.b\.questions"):
        read_questions(storage_path(tmp_path / "none.jsonl"), BENCHMARK)


def test_questions_are_identified_by_text_reference_and_image() -> None:
    question = Question("1", "a.png", "How many?", "count", ("two",))
    same = identity([question], {"a.png": 10})
    assert same == identity([question], {"a.png": 10, "other.png": 5})
    assert same != identity([question], {"a.png": 11})
    assert same != identity([Question("1", "a.png", "How many?", "count", ("one",))], {"a.png": 10})


@pytest.mark.parametrize(
    ("rule", "answers", "told"),
    [
        ("vqa_accuracy", ["a", "a", "a"], "has 3 answers; vqa_accuracy wants 4 or more"),
        ("yes_no", ["maybe"], "has the answer 'maybe'; yes_no wants yes or no"),
    ],
)
def test_a_question_that_could_never_be_right_is_told(rule: str, answers: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "text": "a", "answers": answers}))
    with pytest.raises(UserError, match=told):
        read_questions(storage_path(tmp_path / "q.jsonl"), BENCHMARK.model_copy(update={"metric": rule}))


def test_labels_of_yes_and_no_are_taken_in_any_case(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "text": "a", "answer": "Yes "}))
    (only,) = read_questions(storage_path(tmp_path / "q.jsonl"), BENCHMARK.model_copy(update={"metric": "yes_no"}))
    assert only.references == ("yes",)
