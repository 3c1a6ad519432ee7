"""The seven benchmarks' official files, and anybody's answers to them: joined by key, scored to the digit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raylava.cli import main
from raylava.errors import UserError
from raylava.evaluate.answer_files import read_predictions
from raylava.evaluate.benchmarks import score_file
from raylava.evaluate.metrics.mme import COGNITION, PERCEPTION
from raylava.evaluate.official_benchmarks import OFFICIAL, SHORT, images_of, read_official
from raylava.storage import storage_path

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "scienceqa"


def lines(file: Path, *rows: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pope(folder: Path) -> None:
    for category in ("adversarial", "popular", "random"):
        lines(
            folder / "coco" / f"coco_pope_{category}.json",
            {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"},
            {"question_id": 2, "image": "a.jpg", "text": "Is there a cat in the imange?", "label": "no"},
        )
    asked = [
        {"question_id": n, "image": "a.jpg", "text": f"Is there a {what} in the image?{SHORT}", "category": category}
        for n, (category, what) in enumerate(
            (c, w) for c in ("adversarial", "popular", "random") for w in ("cat", "dog")[: 1 if c == "random" else 2]
        )
    ]
    lines(folder / "llava_pope_test.jsonl", *asked)


def gqa(folder: Path) -> None:
    one = {"imageId": "n1", "question": "Is it red?", "answer": "no", "types": {"structural": "verify"}}
    (folder / "testdev_balanced_questions.json").write_text(json.dumps({"201": one}))


def vqav2(folder: Path) -> None:
    asked = {"questions": [{"image_id": 42, "question": "What is it?", "question_id": 42000}]}
    answers = [{"answer": "cat", "answer_id": n} for n in range(10)]
    labels = {"annotations": [{"question_id": 42000, "answers": answers, "answer_type": "other"}]}
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps(asked))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps(labels))


def mme(folder: Path) -> None:
    """Ten tasks as a folder of images and texts; five, artwork among them, with a folder for each."""
    for task in (*PERCEPTION, *COGNITION):
        parted = task in ("artwork", "celebrity", "landmark", "posters", "scene")
        texts, images = (f"{task}/questions_answers_YN", f"{task}/images") if parted else (task, task)
        for one in (texts, images):
            (folder / one).mkdir(parents=True, exist_ok=True)
        (folder / images / "7.png").touch()
        asked = "Are there two? Please answer yes or no.\tYes\nAre there three?  Please answer yes or no.\tNo\n"
        (folder / texts / "7.txt").write_text(asked)


def mmvp(folder: Path) -> None:
    rows = ["lndex,Question,Options,Correct Answer", "1,Is it open?,(a) Open (b) Closed,(a)"]
    (folder / "Questions.csv").write_text("\n".join([*rows, "2,Is it open?,(a) Open (b) Closed,(b)"]) + "\n")


def scienceqa(folder: Path) -> None:
    def turns(text: str, answer: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]

    rows = [
        {"id": "5", "image": "5/image.png", "conversations": turns("<image>\nWhich?\nA. one\nB. two", "B")},
        {"id": "6", "conversations": turns("Which?\nA. one\nB. two", "The answer is A.")},
    ]
    (folder / "llava_test_CQM-A.json").write_text(json.dumps(rows))


def mm_vet(folder: Path) -> None:
    one = {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]}
    (folder / "mm-vet.json").write_text(json.dumps({"v1_0": one}))


FILES: dict[str, Callable[[Path], None]] = {
    "pope": pope,
    "gqa": gqa,
    "vqav2": vqav2,
    "mme": mme,
    "mmvp": mmvp,
    "scienceqa": scienceqa,
    "mm-vet": mm_vet,
}
EXPECTED = {
    "pope": [("0", "a.jpg", ("no",)), ("1", "a.jpg", ("yes",))] * 1,
    "gqa": [("201", "n1.jpg", ("no",))],
    "vqav2": [("42000", "COCO_val2014_000000000042.jpg", ("cat",) * 10)],
    "mme": [("existence/7.png#0", "existence/7.png", ("yes",)), ("existence/7.png#1", "existence/7.png", ("no",))],
    "mmvp": [("1", "1.jpg", ("(a)", "Open", "Closed")), ("2", "2.jpg", ("(b)", "Open", "Closed"))],
    "scienceqa": [("5", "5/image.png", ("B",)), ("6", None, ("A",))],
    "mm-vet": [("v1_0", "v1_0.png", ("-1<AND>-5",))],
}


def test_there_is_a_case_for_every_benchmark() -> None:
    assert FILES.keys() == OFFICIAL.keys()


@pytest.mark.parametrize("name", FILES)
def test_official_files_become_questions_with_their_labels(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path)
    found = read_official(name, storage_path(tmp_path))
    facts = [(one.question_id, one.image, one.references) for one in found]
    assert facts[: len(EXPECTED[name])] == EXPECTED[name]
    assert len({one.question_id for one in found}) == len(found)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_without_the_files_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing; give the folder"):
        read_official(name, storage_path(tmp_path))


def test_pope_joins_by_image_and_question_although_files_differ_in_order_length_and_spelling(tmp_path: Path) -> None:
    pope(tmp_path)
    found = read_official("pope", storage_path(tmp_path))
    assert len(found) == 5, "the random label file has one more than there are questions, as published"
    assert [one.references[0] for one in found] == ["no", "yes", "no", "yes", "no"]


@pytest.mark.parametrize(
    ("category", "told"), [("popular", "1 labels have no question there, the first is .*a bird"), ("random", None)]
)
def test_a_label_without_its_question_is_named(category: str, told: str | None, tmp_path: Path) -> None:
    pope(tmp_path)
    file = tmp_path / "coco" / f"coco_pope_{category}.json"
    extra = {"question_id": 3, "image": "a.jpg", "text": "Is there a bird in the image?", "label": "no"}
    file.write_text(file.read_text() + json.dumps(extra) + "\n")
    if told is None:
        read_official("pope", storage_path(tmp_path))
        return
    with pytest.raises(UserError, match=told):
        read_official("pope", storage_path(tmp_path))


def test_a_question_without_its_label_is_named(tmp_path: Path) -> None:
    pope(tmp_path)
    file = tmp_path / "coco" / "coco_pope_popular.json"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"question 2 \(a.jpg: Is there a cat in the image\?\) has no label in popular"):
        read_official("pope", storage_path(tmp_path))
    vqav2(tmp_path)
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text('{"annotations": []}')
    with pytest.raises(UserError, match="question 42000 has no annotation"):
        read_official("vqav2", storage_path(tmp_path))


def test_pope_without_llavas_questions_asks_the_labels_own(tmp_path: Path) -> None:
    pope(tmp_path)
    (tmp_path / "llava_pope_test.jsonl").unlink()
    found = read_official("pope", storage_path(tmp_path))
    assert [one.question_id for one in found][:2] == ["adversarial-1", "adversarial-2"]
    assert all(one.text.endswith(SHORT) for one in found)


def test_images_lie_where_the_benchmark_puts_them(tmp_path: Path) -> None:
    assert images_of("pope", storage_path(tmp_path)) == storage_path(tmp_path)
    (tmp_path / "val2014").mkdir()
    assert images_of("pope", storage_path(tmp_path)) == storage_path(tmp_path) / "val2014"


@pytest.mark.parametrize("image", ["count/7.png", "artwork/images/7.png", "artwork/7.jpg"])
def test_llavas_answers_to_mme_are_told_apart_by_their_prompts(image: str, tmp_path: Path) -> None:
    mme(tmp_path)
    prompt = "Are there {}?\nAnswer the question using a single word or phrase."
    lines(
        tmp_path / "said.jsonl",
        {"question_id": image, "prompt": prompt.format("three"), "text": "No"},
        {"question_id": image, "prompt": prompt.format("two"), "text": "Yes"},
    )
    found = score_file("mme", str(tmp_path), str(tmp_path / "said.jsonl"))
    assert (found.figures["perception"].value, found.figures["cognition"].value) == (200.0, 0.0)
    assert found.by_category[image.partition("/")[0]] == {"units": 1.0, "points": 200.0}
    assert (found.questions, len(found.missing)) == (28, 26)


def test_an_mme_release_without_a_task_is_told(tmp_path: Path) -> None:
    mme(tmp_path)
    shutil.rmtree(tmp_path / "OCR")
    with pytest.raises(UserError, match="MME's task OCR is missing"):
        read_official("mme", storage_path(tmp_path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"question_id": 201, "text": "No."}', "No."),
        ('[{"questionId": "201", "prediction": "no"}]', "no"),
        ('[{"question_id": 201, "answer": "no"}]', "no"),
        ('{"201": "no"}', "no"),
        ('{\n "201": "no"\n}', "no"),
        ('{"question_id": 201, "text": "", "metadata": {"problem": "image_missing"}}', None),
        ('{"question_id": 201, "text": "a\\u2028b\u2028c", "metadata": null}', "a\u2028b\u2028c"),
    ],
)
def test_answers_are_read_in_every_official_form(content: str, said: str | None, tmp_path: Path) -> None:
    (tmp_path / "said").write_text(content)
    (only,) = read_predictions(storage_path(tmp_path / "said"))
    assert (only.question_id, only.text) == ("201", said)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"question_id": 202, "text": "no"}', "the answer to '202' has no question"),
        ('{"question_id": 201, "text": "no"}\n{"question_id": 201, "text": "yes"}', "two answers to '201'"),
        ('{"question_id": 201}\n{"question_id": 201}', "not a file of answers"),
        ("nonsense", "not a file of answers"),
    ],
)
def test_answers_that_do_not_fit_are_named(content: str, told: str, tmp_path: Path) -> None:
    gqa(tmp_path)
    (tmp_path / "said").write_text(content)
    with pytest.raises(UserError, match=told):
        score_file("gqa", str(tmp_path), str(tmp_path / "said"))


def test_an_unanswered_question_is_wrong_and_listed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gqa(tmp_path)
    (tmp_path / "said.json").write_text("{}")
    command = ["score", "gqa", "--data", str(tmp_path), "--answers", str(tmp_path / "said.json"), "--json"]
    assert main(command) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["questions"], found["missing"]) == (1, ["201"])
    assert found["figures"]["exact_match"]["value"] == 0.0


def test_mm_vet_wants_a_judge_and_takes_its_official_reply(tmp_path: Path) -> None:
    mm_vet(tmp_path)
    with pytest.raises(UserError, match="graded by a judge"):
        score_file("mm-vet", str(tmp_path), "")
    (tmp_path / "grades.json").write_text(json.dumps({"v1_0": {"content": ["0.5"], "score": [0.5, 1.0]}}))
    found = score_file("mm-vet", str(tmp_path), "", grades=str(tmp_path / "grades.json"))
    assert found.figures["total"].value == 75.0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["popee", "--answers", "x"], "no such benchmark; known here: pope, "),
        (["gqa"], "give --answers FILE"),
        (["gqa", "--answers", "nowhere"], "nowhere: no such file"),
        (["pope", "--answers", "x", "--protocol", "vlmevalkit"], "protocol vlmevalkit: pope has llava, lmms-eval"),
    ],
)
def test_a_mistake_in_the_command_is_told_in_one_line(
    arguments: list[str], told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gqa(tmp_path)
    pope(tmp_path)
    assert main(["score", *arguments, "--data", str(tmp_path)]) == 2
    error = capfd.readouterr().err
    assert told in error.replace("\n", " ")


@pytest.mark.skipif(not GOLDEN.exists(), reason="shared/golden/scienceqa (published predictions) is not here")
def test_llava_13b_scores_on_science_qa_as_published() -> None:
    found = score_file("scienceqa", str(GOLDEN), str(GOLDEN / "answers.jsonl"))
    assert found.questions == 4241
    assert round(found.figures["accuracy"].value * 4241, 6) == 3155
    assert round(found.figures["image_accuracy"].value * 2017, 6) == 1445
