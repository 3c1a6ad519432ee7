"""Files of answers are read in every official format and joined to questions by id or prompt."""

from pathlib import Path

import pytest

from raylava.errors import UserError
from raylava.evaluation.answer_files import read_predictions
from raylava.evaluation.loading import load_official_benchmark, score_file
from raylava.storage import storage_path
from tests.support.official_files import write_gqa, write_jsonl, write_mme, write_mmvp


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"question_id": 201, "text": "No."}', "No."),
        ('[{"questionId": "201", "prediction": "no"}]', "no"),
        ('[{"question_id": 201, "answer": "no"}]', "no"),
        ('{"201": "no"}', "no"),
        ('{\n "201": "no"\n}', "no"),
        ('{"question_id": 201, "prompt": "?", "answer": "(a)", "response": "no", "model_id": "m"}', "no"),
        ('\ufeff{"question_id": 201, "text": "no"}', "no"),
        ('{"question_id": 201, "text": "", "metadata": {"problem": "image_missing"}}', None),
        ('{"question_id": 201, "text": "a\\u2028b\u2028c", "metadata": null}', "a\u2028b\u2028c"),
    ],
)
def test_answers_are_read_in_every_official_format(content: str, text: str | None, tmp_path: Path) -> None:
    (tmp_path / "answers").write_text(content)
    (prediction,) = read_predictions(storage_path(tmp_path / "answers"))
    assert (prediction.question_id, prediction.text) == ("201", text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question_id": 202, "text": "no"}', "the answer to '202' has no question"),
        ('{"question_id": 201, "text": "no"}\n{"question_id": 201, "text": "yes"}', "two answers to '201'"),
        ('{"question_id": 201}\n{"question_id": 201}', "not a file of answers"),
        ("nonsense", "not a file of answers"),
        ('{"question_id": 201, "text": "a"}\n\n{"question_id": 201,}', r"answers:3: not a file of answers"),
        ('{"question_id": 201, "text": "yes", "answer": "no"}', r"answers:1: .*has text and answer, which leaves open"),
        ('{"question_id": 201, "text": "yes", "response": "no"}', r"answers:1: .*has text and response"),
        ('[{"question_id": 201, "label": "no"}]', r"answers: entry 0: .*has no text, which leaves open"),
        ('{"201": ["no"]}', r"answers: entry '201': .*has a list for a text"),
    ],
)
def test_answers_that_do_not_match_the_questions_are_rejected(content: str, message: str, tmp_path: Path) -> None:
    write_gqa(tmp_path)
    (tmp_path / "answers").write_text(content)
    with pytest.raises(UserError, match=message):
        score_file("gqa", str(tmp_path), str(tmp_path / "answers"))


@pytest.mark.parametrize("image", ["count/7.png", "artwork/images/7.png", "artwork/7.jpg"])
def test_llavas_mme_answers_with_equal_ids_are_matched_by_prompt(image: str, tmp_path: Path) -> None:
    write_mme(tmp_path)
    prompt = "Are there {}?\nAnswer the question using a single word or phrase."
    write_jsonl(
        tmp_path / "answers.jsonl",
        {"question_id": image, "prompt": prompt.format("three"), "text": "No"},
        {"question_id": image, "prompt": prompt.format("two"), "text": "Yes"},
    )
    result = score_file("mme", str(tmp_path), str(tmp_path / "answers.jsonl"))
    assert (result.scores["perception"].value, result.scores["cognition"].value) == (200.0, 0.0)
    assert result.by_category[image.partition("/")[0]] == {"units": 1.0, "points": 200.0}
    assert (result.questions, len(result.missing)) == (28, 26)


def test_mmvps_own_answer_file_is_scored_by_what_the_model_said_not_by_the_label(tmp_path: Path) -> None:
    write_mmvp(tmp_path)
    answers = [
        {"question_id": int(question.question_id), "answer": question.references[0], "response": "I do not know"}
        for question in load_official_benchmark("mmvp", str(tmp_path)).questions
    ]
    write_jsonl(tmp_path / "answers.jsonl", *answers)
    result = score_file("mmvp", str(tmp_path), str(tmp_path / "answers.jsonl"))
    assert result.headline[1].value == 0.0
