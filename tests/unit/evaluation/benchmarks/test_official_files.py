"""The official files of the seven benchmarks become questions; labels are joined to questions by key."""

import json
import shutil
from pathlib import Path

import pytest

from raylava.errors import UserError
from raylava.evaluation.benchmarks import official_benchmarks, register
from raylava.evaluation.benchmarks.benchmark import OfficialBenchmark
from raylava.evaluation.benchmarks.files import SHORT_ANSWER_SUFFIX
from raylava.evaluation.loading import read_official_questions
from raylava.evaluation.metrics.scoring import EXACT_MATCH
from raylava.evaluation.questions import Question
from raylava.storage import storage_path
from tests.support.official_files import OFFICIAL_FILES, write_mme, write_pope, write_vqav2

EXPECTED = {
    "pope": [("0", "a.jpg", ("no",)), ("1", "a.jpg", ("yes",))],
    "gqa": [("201", "n1.jpg", ("no",))],
    "vqav2": [("42000", "COCO_val2014_000000000042.jpg", ("cat",) * 10)],
    "mme": [("existence/7.png#0", "existence/7.png", ("yes",)), ("existence/7.png#1", "existence/7.png", ("no",))],
    "mmvp": [("1", "1.jpg", ("(a)", "Open", "Closed")), ("2", "2.jpg", ("(b)", "Open", "Closed"))],
    "scienceqa": [("5", "5/image.png", ("B",)), ("6", None, ("A",))],
    "mm-vet": [("v1_0", "v1_0.png", ("-1<AND>-5",))],
}


def read(name: str, folder: Path) -> list[Question]:
    return read_official_questions(official_benchmarks()[name], storage_path(folder))


def test_every_benchmark_has_a_case() -> None:
    assert OFFICIAL_FILES.keys() == official_benchmarks().keys()


@pytest.mark.parametrize("name", OFFICIAL_FILES)
def test_official_files_become_questions_with_their_labels(name: str, tmp_path: Path) -> None:
    OFFICIAL_FILES[name](tmp_path)
    questions = read(name, tmp_path)
    fields = [(question.question_id, question.image, question.references) for question in questions]
    assert fields[: len(EXPECTED[name])] == EXPECTED[name]
    assert len({question.question_id for question in questions}) == len(questions)


@pytest.mark.parametrize("name", OFFICIAL_FILES)
def test_missing_official_file_is_reported(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing; give the folder"):
        read(name, tmp_path)


def test_pope_labels_join_questions_despite_different_order_length_and_spelling(tmp_path: Path) -> None:
    write_pope(tmp_path)
    questions = read("pope", tmp_path)
    assert len(questions) == 5, "as published, the label file of `random` has one label more than questions"
    assert [question.references[0] for question in questions] == ["no", "yes", "no", "yes", "no"]


@pytest.mark.parametrize(
    ("category", "message"),
    [("popular", "1 labels have no question; the first is .*a bird"), ("random", None)],
)
def test_label_without_question_is_reported_except_in_popes_random_category(
    category: str, message: str | None, tmp_path: Path
) -> None:
    write_pope(tmp_path)
    file = tmp_path / "coco" / f"coco_pope_{category}.json"
    extra = {"question_id": 3, "image": "a.jpg", "text": "Is there a bird in the image?", "label": "no"}
    file.write_text(file.read_text() + json.dumps(extra) + "\n")
    if message is None:
        read("pope", tmp_path)
        return
    with pytest.raises(UserError, match=message):
        read("pope", tmp_path)


def test_question_without_label_is_reported(tmp_path: Path) -> None:
    write_pope(tmp_path)
    file = tmp_path / "coco" / "coco_pope_popular.json"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"question 2 \(a.jpg: Is there a cat in the image\?\) has no label in popular"):
        read("pope", tmp_path)
    write_vqav2(tmp_path)
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text('{"annotations": []}')
    with pytest.raises(UserError, match="question 42000 has no annotation"):
        read("vqav2", tmp_path)


def test_pope_without_llavas_question_file_uses_the_label_files(tmp_path: Path) -> None:
    write_pope(tmp_path)
    (tmp_path / "llava_pope_test.jsonl").unlink()
    questions = read("pope", tmp_path)
    assert [question.question_id for question in questions][:2] == ["adversarial-1", "adversarial-2"]
    assert all(question.text.endswith(SHORT_ANSWER_SUFFIX) for question in questions)


def test_image_root_is_the_first_existing_image_folder(tmp_path: Path) -> None:
    assert official_benchmarks()["pope"].image_root(storage_path(tmp_path)) == storage_path(tmp_path)
    (tmp_path / "val2014").mkdir()
    assert official_benchmarks()["pope"].image_root(storage_path(tmp_path)) == storage_path(tmp_path) / "val2014"


def test_mme_release_without_a_task_is_rejected(tmp_path: Path) -> None:
    write_mme(tmp_path)
    shutil.rmtree(tmp_path / "OCR")
    with pytest.raises(UserError, match="MME's task OCR is missing"):
        read("mme", tmp_path)


def test_benchmark_with_the_name_of_another_is_refused() -> None:
    for name in ("gqa", "custom"):
        with pytest.raises(ValueError, match=f"benchmark {name} exists already"):
            register(OfficialBenchmark(name, lambda data: [], EXACT_MATCH))
