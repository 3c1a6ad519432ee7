"""Custom question files: JSONL, or LLaVA JSON, where each human turn is a question."""

import json
from pathlib import Path

import pytest

from raylava.config.recipe import Benchmark
from raylava.errors import UserError
from raylava.evaluation.loading import load_benchmark
from raylava.evaluation.questions import Question, questions_fingerprint, read_questions
from raylava.storage import storage_path

BENCHMARK = Benchmark(name="b", questions="q", categories={"count": "^How many", "truth": "true"})


def test_jsonl_lines_become_questions(tmp_path: Path) -> None:
    lines = [
        {"question_id": 1, "image": "a.png", "text": "How many?", "answer": "two"},
        {"question_id": "x", "text": "Hello", "category": "talk", "answer": "Hi"},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert read_questions(storage_path(tmp_path / "q.jsonl"), BENCHMARK) == [
        Question("1", "a.png", "How many?", "count", ("two",)),
        Question("x", None, "Hello", "talk", ("Hi",)),
    ]


def test_each_human_turn_of_llava_json_is_a_question_with_its_history(tmp_path: Path) -> None:
    conversation = [
        {"from": "human", "value": "<image>\nIs it true?"},
        {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "How many cats?"},
        {"from": "gpt", "value": "2"},
    ]
    rows = [{"id": "r", "image": f"{split}/a.png", "conversations": conversation} for split in "05"]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    filtered = BENCHMARK.model_copy(update={"include": ("5/*",)})
    assert read_questions(storage_path(tmp_path / "q.json"), filtered) == [
        Question("r#1-0", "5/a.png", "Is it true?", "truth", ("yes",)),
        Question("r#1-1", "5/a.png", "How many cats?", "count", ("2",), (("Is it true?", "yes"),)),
    ]
    assert len(read_questions(storage_path(tmp_path / "q.json"), BENCHMARK.model_copy(update={"max_rows": 3}))) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", '{"question_id": 1, "text": "a"}', "q.jsonl:1: not a question"),
        ("q.jsonl", "nonsense", "q.jsonl:1: not a question"),
        ("q.jsonl", "", "q.jsonl: contains no question"),
        ("q.json", '[{"conversations": []}]', "row 0 is not a conversation"),
        ("q.jsonl", '{"question_id": 1, "text": "a", "answer": "b"}\n' * 2, "two questions have the id '1'"),
        ("q.jsonl", '{"question_id": 1, "text": "a", "answers": []}', "question '1' has no answer"),
    ],
)
def test_malformed_question_file_is_rejected(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_questions(storage_path(tmp_path / name), BENCHMARK)


def test_folder_in_place_of_a_question_file_is_reported_by_recipe_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.a\.questions: .*: a folder; name the file of questions"):
        read_questions(storage_path(tmp_path), Benchmark(name="a", questions=str(tmp_path)))


def test_missing_question_file_is_reported_by_recipe_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.b\.questions"):
        read_questions(storage_path(tmp_path / "none.jsonl"), BENCHMARK)


def test_fingerprint_depends_on_references_and_image_sizes() -> None:
    question = Question("1", "a.png", "How many?", "count", ("two",))
    expected = questions_fingerprint([question], {"a.png": 10})
    assert expected == questions_fingerprint([question], {"a.png": 10, "other.png": 5})
    assert expected != questions_fingerprint([question], {"a.png": 11})
    changed = Question("1", "a.png", "How many?", "count", ("one",))
    assert expected != questions_fingerprint([changed], {"a.png": 10})


@pytest.mark.parametrize(
    ("metric", "answers", "message"),
    [
        ("vqa_accuracy", ["a", "a", "a"], "has 3 answers; vqa_accuracy needs at least 4"),
        ("yes_no", ["maybe"], "has the answer 'maybe'; yes_no needs yes or no"),
    ],
)
def test_question_that_no_answer_can_satisfy_is_rejected(
    metric: str, answers: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "text": "a", "answers": answers}))
    with pytest.raises(UserError, match=message):
        read_questions(storage_path(tmp_path / "q.jsonl"), BENCHMARK.model_copy(update={"metric": metric}))


def test_yes_no_labels_are_case_insensitive(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "text": "a", "answer": "Yes "}))
    benchmark = BENCHMARK.model_copy(update={"metric": "yes_no"})
    (question,) = read_questions(storage_path(tmp_path / "q.jsonl"), benchmark)
    assert question.references == ("yes",)


def test_images_of_a_custom_benchmark_are_below_the_folder_of_its_questions(tmp_path: Path) -> None:
    (tmp_path / "held-out").mkdir()
    (tmp_path / "held-out" / "questions.jsonl").write_text(
        '{"question_id": 1, "image": "a.png", "text": "?", "answer": "x"}'
    )
    benchmark = Benchmark(name="b", questions="held-out/questions.jsonl")
    assert load_benchmark(benchmark, str(tmp_path)).image_root == str(tmp_path / "held-out")
    elsewhere = benchmark.model_copy(update={"images": "images"})
    assert load_benchmark(elsewhere, str(tmp_path)).image_root == str(tmp_path / "images")


@pytest.mark.parametrize("image", [1, ["a.png"], {"path": "a.png"}])
def test_image_of_a_question_is_a_path(image: object, tmp_path: Path) -> None:
    line = {"question_id": 1, "image": image, "text": "?", "answer": "x"}
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match=r"q\.jsonl:1: not a question \(ValueError: image is a (int|list|dict)"):
        load_benchmark(Benchmark(name="b", questions="q.jsonl"), str(tmp_path))


def test_images_behind_a_link_out_of_the_folder_do_not_count_as_there(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(b"1")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").symlink_to(tmp_path / "elsewhere")
    line = {"question_id": 1, "image": "images/a.png", "text": "?", "answer": "x"}
    (tmp_path / "data" / "q.jsonl").write_text(json.dumps(line))
    assert load_benchmark(Benchmark(name="b", questions="q.jsonl"), str(tmp_path / "data")).image_sizes == {}
    line["image"] = "a.png"
    (tmp_path / "data" / "q.jsonl").write_text(json.dumps(line))
    benchmark = Benchmark(name="b", questions="q.jsonl", images="images")
    assert load_benchmark(benchmark, str(tmp_path / "data")).image_sizes == {"a.png": 1}
