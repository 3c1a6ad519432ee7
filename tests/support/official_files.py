"""Writes small official files of each benchmark: the published layout with a handful of questions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raylava.evaluation.benchmarks.files import SHORT_ANSWER_SUFFIX
from raylava.evaluation.benchmarks.mme import COGNITION, PERCEPTION


def write_jsonl(file: Path, *rows: dict[str, Any]) -> None:
    """Write one JSON object per line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pope(folder: Path) -> None:
    """Write label files and LLaVA's question file, which differ in order, length and spelling."""
    categories = ("adversarial", "popular", "random")
    for category in categories:
        write_jsonl(
            folder / "coco" / f"coco_pope_{category}.json",
            {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"},
            {"question_id": 2, "image": "a.jpg", "text": "Is there a cat in the imange?", "label": "no"},
        )
    objects = [(category, name) for category in categories for name in ("cat", "dog")]
    questions = [
        {
            "question_id": number,
            "image": "a.jpg",
            "text": f"Is there a {name} in the image?{SHORT_ANSWER_SUFFIX}",
            "category": category,
        }
        for number, (category, name) in enumerate(objects[:-1])  # `random` lacks the question of its last label
    ]
    write_jsonl(folder / "llava_pope_test.jsonl", *questions)


def write_gqa(folder: Path) -> None:
    """Write one question."""
    question = {"imageId": "n1", "question": "Is it red?", "answer": "no", "types": {"structural": "verify"}}
    (folder / "testdev_balanced_questions.json").write_text(json.dumps({"201": question}))


def write_vqav2(folder: Path) -> None:
    """Write one question with ten equal answers."""
    questions = {"questions": [{"image_id": 42, "question": "What is it?", "question_id": 42000}]}
    answers = [{"answer": "cat", "answer_id": number} for number in range(10)]
    annotations = {"annotations": [{"question_id": 42000, "answers": answers, "answer_type": "other"}]}
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps(questions))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps(annotations))


def write_mme(folder: Path) -> None:
    """Write one image per task; as published, five tasks keep texts and images in separate folders."""
    for task in (*PERCEPTION, *COGNITION):
        separate = task in ("artwork", "celebrity", "landmark", "posters", "scene")
        texts, images = (f"{task}/questions_answers_YN", f"{task}/images") if separate else (task, task)
        for subfolder in (texts, images):
            (folder / subfolder).mkdir(parents=True, exist_ok=True)
        (folder / images / "7.png").touch()
        questions = "Are there two? Please answer yes or no.\tYes\nAre there three?  Please answer yes or no.\tNo\n"
        (folder / texts / "7.txt").write_text(questions)


def write_mmvp(folder: Path) -> None:
    """Write one pair of questions below the published, misspelled header."""
    rows = ["lndex,Question,Options,Correct Answer", "1,Is it open?,(a) Open (b) Closed,(a)"]
    (folder / "Questions.csv").write_text("\n".join([*rows, "2,Is it open?,(a) Open (b) Closed,(b)"]) + "\n")


def write_scienceqa(folder: Path) -> None:
    """Write a question with an image and one without."""

    def turns(text: str, answer: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]

    rows = [
        {"id": "5", "image": "5/image.png", "conversations": turns("<image>\nWhich?\nA. one\nB. two", "B")},
        {"id": "6", "conversations": turns("Which?\nA. one\nB. two", "The answer is A.")},
    ]
    (folder / "llava_test_CQM-A.json").write_text(json.dumps(rows))


def write_mm_vet(folder: Path) -> None:
    """Write one question that requires two capabilities."""
    question = {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]}
    (folder / "mm-vet.json").write_text(json.dumps({"v1_0": question}))


OFFICIAL_FILES: dict[str, Callable[[Path], None]] = {
    "pope": write_pope,
    "gqa": write_gqa,
    "vqav2": write_vqav2,
    "mme": write_mme,
    "mmvp": write_mmvp,
    "scienceqa": write_scienceqa,
    "mm-vet": write_mm_vet,
}
